"""A family is data: a mixer that only this file knows, through the whole loop in both twins."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from cases import make_batch, make_params

from backends import BACKENDS, Backend
from recurrentgemma.common.model import memory, reference
from recurrentgemma.common.model.config import Layer, ModelConfig, config_from_json
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.mixers import Attention, Rope, register_mixer
from recurrentgemma.common.model.params import StateSpec, conv_1d, linear, under
from tolerances import assert_close


class ConvolutionCache(NamedTuple):
    conv1d_state: Any


@register_mixer
@dataclasses.dataclass(frozen=True)
class GatedConvolution:
    """y = (sigmoid(x W_g) * conv(x W_x)) W_out."""

    taps: int = 3
    kind: ClassVar[str] = "convolution"
    cache: ClassVar[type] = ConvolutionCache

    def params(self, width, variance):
        for name in ("gate", "value"):
            yield from under(name, linear((width, width), ("width", "lru"), "recurrent"))
        yield from under("conv_1d", conv_1d(width, self.taps))
        yield from under("out", linear((width, width), ("lru", "width"), "recurrent", variance))

    def state(self, capacity):
        yield StateSpec("conv1d_state", (self.taps - 1, 24), "compute", ("conv", "lru"))


def in_reference(mixer, params, x, positions, state):
    gate = reference.sigmoid(reference.linear(reference.subtree(params, "gate"), x))
    value = reference.linear(reference.subtree(params, "value"), x)
    w, b, before = params["conv_1d.w"], params["conv_1d.b"], state["conv1d_state"]
    value, after = reference.conv_1d(value, w, b, positions, before)
    out = reference.linear(reference.subtree(params, "out"), gate * value)
    return out, {"conv1d_state": after}


def in_torch(width, mixer, variance, scan_type, dtype):
    from recurrentgemma.torch.layers import Conv1D, Linear, SpecModule

    class Block(SpecModule):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value = (Linear(width, width, dtype=dtype) for _ in range(2))
            self.conv_1d = Conv1D(width, mixer.taps, device="meta", dtype=dtype)
            self.out = Linear(width, width, True, variance, dtype)

        def forward(self, x, segment_pos, cache=None):
            value, state = self.conv_1d(self.value(x), segment_pos, cache and cache[0])
            return self.out(self.gate(x).sigmoid() * value), ConvolutionCache(state)

    return Block()


def in_jax(width, mixer, variance, **settings):
    import flax.linen as nn

    from recurrentgemma.jax.layers import Conv1D, SpecModule

    class Block(SpecModule):
        @nn.compact
        def __call__(self, x, segment_pos, cache=None):
            conv_1d = self.child(Conv1D, "conv_1d", width, mixer.taps)
            value = self.linear("value", width, width)(x)
            value, state = conv_1d(value, segment_pos, cache and cache[0])
            y = nn.sigmoid(self.linear("gate", width, width)(x)) * value
            return self.linear("out", width, width, True, variance)(y), ConvolutionCache(state)

    return Block(**settings)


ATTENTION = Attention(4, 2, 8, 6, Rope(), scale=0.3)
LAYERS = (Layer(GatedConvolution(), 32, mlp_bias=True), Layer(ATTENTION, 32, mlp_bias=False))
CONFIG = ModelConfig(31, 24, LAYERS, embedding_scale=2.0)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.MIXERS, GatedConvolution, in_reference)
    for name, block in (("torch", in_torch), ("jax", in_jax)):
        if name in BACKENDS:
            module = pytest.importorskip(f"recurrentgemma.{name}.blocks")
            monkeypatch.setitem(module.MIXERS, GatedConvolution, block)


def test_forward_and_splits(backend: Backend) -> None:
    tokens, segment_pos = make_batch(CONFIG, 13)
    params, model = make_params(CONFIG), backend.griffin(CONFIG, make_params(CONFIG))
    expected, expected_state = reference.forward(CONFIG, params, tokens, segment_pos)
    state, parts = reference.init_state(CONFIG, 3), []
    for part in (slice(0, 6), slice(6, 7), slice(7, 13)):
        logits, state = model(tokens[:, part], segment_pos[:, part], state)
        parts.append(logits)
    real = segment_pos >= 0
    assert_close(np.concatenate(parts, 1)[real], expected[real], "logits", "float64")
    assert_close(state, expected_state, "state", "float64")


def test_init_json_and_tables(backend: Backend) -> None:
    assert config_from_json(CONFIG.to_json()) == CONFIG
    drawn = backend.init_params(CONFIG, 3)
    assert {path: value.shape for path, value in drawn.items()} == {
        spec.path: spec.shape for spec in layer_spec(CONFIG)
    }
    assert memory.state_bytes(CONFIG, "float32") == 4 * (2 * 24 + 2 * 6 * 2 * 8 + 1)
    assert memory.training_table(CONFIG, "float32")["adamw"].parameters == 4 * sum(
        spec.size for spec in layer_spec(CONFIG)
    )
