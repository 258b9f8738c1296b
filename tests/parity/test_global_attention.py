"""Attention over all earlier keys goes in blocks of queries: nothing shows where a block ends."""

import numpy as np
import pytest
from cases import make_batch, make_params, make_tokens, positions
from comparing import check_gradients
from sweeps import fewer_in_jax

from backends import Backend
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.config import Config, Layer, ModelConfig
from recurrentgemma.common.model.mixers import Attention, Rope
from recurrentgemma.common.model.state import round_capacity
from tolerances import assert_close


def make_model(soft_cap: float) -> ModelConfig:
    """One layer, two query heads to a key head."""
    mixer = Attention(4, 2, 4, None, Rope(), scale=0.5, soft_cap=soft_cap, qk_norm=not soft_cap)
    return ModelConfig(
        vocab_size=17, width=8, layers=(Layer(mixer, mlp=8, mlp_bias=False),), embedding_scale=3.0
    )


CONFIGS = {"plain": make_model(0.0), "capped": make_model(1.5)}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Config:
    return CONFIGS[request.param]


# Around the ends of JAX's blocks, which have 128 queries, and of PyTorch's, which have 256.
LENGTHS = (127, 128, 129, 255, 256, 257, 640, 641)
EDGES = [(name, length) for length in LENGTHS for name in CONFIGS]
IN_TURN = [(name, length) for i, (name, length) in enumerate(EDGES) if i % 4 in (0, 3)]


@pytest.mark.parametrize(("backend", "edge"), fewer_in_jax(EDGES, IN_TURN), indirect=["backend"])
def test_block_edges(backend: Backend, edge: tuple[str, int]) -> None:
    """One document, several, and left padding."""
    name, length = edge
    config = CONFIGS[name]
    tokens, segment_pos = make_batch(config, length)
    params, empty = make_params(config), reference.init_state(config, 3, round_capacity(length))
    expected, after = reference.forward(config, params, tokens, segment_pos, empty)
    logits, state = backend.griffin(config, params)(tokens, segment_pos)
    real = segment_pos >= 0
    assert_close(logits[real], expected[real], "logits", "float64")
    assert_close(state, after, "state", "float64")


def test_chunks_on_a_growing_state(backend: Backend, config: Config) -> None:
    """With padding, new documents and single tokens between."""
    model, params = backend.griffin(config, make_params(config)), make_params(config)
    rows = [positions([806]), positions([300, 499], 7), positions([427, 130, 246], 3)]
    segment_pos, start = np.array(rows, np.int32), 0
    state = reference.init_state(config, 3, 1024)
    for length in (3, 1, 3, 270, 1, 129, 270, 129):
        chunk = slice(start, start + length)
        tokens, place = make_tokens(config, 3, length, seed=start), segment_pos[:, chunk]
        expected, after = reference.forward(config, params, tokens, place, state)
        logits, new_state = model(tokens, place, state)
        real = place >= 0
        assert_close(logits[real], expected[real], "logits", "float64")
        assert_close(new_state, after, "state", "float64")
        state, start = after, start + length
    assert state["blocks.0"]["num_tokens"].tolist() == [806, 499, 246]


def test_padding_and_a_new_document_in_steps(backend: Backend, config: Config) -> None:
    """A row is padding, one starts, one goes on."""
    model, params = backend.griffin(config, make_params(config)), make_params(config)
    tokens, segment_pos = make_batch(config, 12)
    _, state = reference.forward(
        config, params, tokens, segment_pos, reference.init_state(config, 3)
    )
    place = np.array([[-1], [0], [9]], np.int32)
    expected, after = reference.forward(config, params, tokens[:, :1], place, state)
    logits, new_state = model(tokens[:, :1], place, state)
    assert_close(logits[1:], expected[1:], "logits", "float64")
    assert np.isfinite(logits).all()
    assert_close(new_state, after, "state", "float64")


def test_gradients_of_the_twins(twins: tuple[Backend, Backend], config: Config) -> None:
    """Their blocks differ in length."""
    check_gradients(twins, config, 300)


def test_a_growing_state_is_not_changed(backend: Backend, config: Config) -> None:
    """Neither by a step nor by a chunk, in the twin's own arrays."""
    _, call = backend.raw_griffin(config, make_params(config))
    tokens, segment_pos = make_batch(config, 12)
    cache = call(tokens, segment_pos, None)[1]
    before = {field: z.copy() for field, z in backend.to_numpy(cache)["blocks.0"].items()}
    for length in (1, 5):
        place = segment_pos[:, -1:] + 1 + np.arange(length, dtype=np.int32)
        _, after = call(tokens[:, :length], place, cache)
        kept, moved = (backend.to_numpy(z)["blocks.0"] for z in (cache, after))
        for field, value in before.items():
            np.testing.assert_array_equal(kept[field], value, err_msg=field)
            assert (moved[field] != value).any(), field
