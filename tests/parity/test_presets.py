"""Every published model at a reduced width, with its true pattern of layers, in both twins."""

import dataclasses

import pytest
from cases import make_params
from comparing import make_model
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.model.activations import activation_names
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import state_spec
from recurrentgemma.common.model.presets import Preset
from recurrentgemma.parity import make_batch
from tolerances import assert_close

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")


def reduced(preset: Preset) -> Config:
    """Its heads, scales and caps; the ratio of the recurrent width to the width.

    The 9B model keeps its last eleven layers, three times its pattern as it ends and a name of two
    digits; the other Griffins their last five. A Gemma 3 keeps layers 4 to 6, one of which attends
    to all keys, and the others two. In the long profile, Griffins keep all, and Gemmas seven.
    """
    config = config_from_preset(preset, vocab_size=61)
    if isinstance(config, GemmaConfig):
        sizes = {"width": 36, "mlp_width": 40, "head_dim": 4}
        window = None if config.sliding_window is None else 6
        layers = config.layer_types[sweep(slice(4, 7 if config.version == 3 else 6), slice(7))]
        return dataclasses.replace(config, **sizes, layer_types=layers, sliding_window=window)
    assert isinstance(config, GriffinConfig)
    heads = config.num_heads
    kept = -11 if preset is Preset.RECURRENT_GEMMA_9B_V1 else -5
    return dataclasses.replace(
        config,
        block_types=config.block_types[sweep(kept, None) :],
        width=8 * heads,
        lru_width=config.lru_width * 8 * heads // config.width,
        mlp_expanded_width=3 * 8 * heads,
        attention_window_size=6,
    )


@pytest.mark.parametrize("preset", Preset)
def test_preset(twins: tuple[Backend, Backend], preset: Preset) -> None:
    config, full = reduced(preset), config_from_preset(preset)
    if isinstance(config, GriffinConfig):
        assert isinstance(full, GriffinConfig)
        pattern = full.block_types[:3]
        assert full.block_types == (pattern * full.num_layers)[: full.num_layers]
        assert config.block_types == (pattern * full.num_layers)[: config.num_layers]
        assert config.lru_width * full.width == full.lru_width * config.width
    batch = make_batch(config, 16)
    one, other = (make_model(backend, config, make_params(config), "float64") for backend in twins)
    names = activation_names(config)
    (first, state), (second, other_state) = (
        model.run(batch.tokens, batch.segment_pos, None, names) for model in (one, other)
    )
    first, second = first | one.arrays_of(state), second | other.arrays_of(other_state)
    assert list(first) == [*names, "logits", *(spec.path for spec in state_spec(config))]
    for name, value in first.items():
        places = batch.segment_pos >= 0 if name in names or name == "logits" else ...
        assert_close(second[name][places], value[places], "output", "float64", name=name)
