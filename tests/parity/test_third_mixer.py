"""A family is data: a mixer that only this file knows, through the whole loop in both twins."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from cases import make_batch, make_params

from recurrentgemma import parity
from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.model import config, layer_spec, memory, mixers, params, reference
from recurrentgemma_conversion import convert
from tolerances import assert_close


class ConvolutionCache(NamedTuple):
    state: Any


@dataclasses.dataclass(frozen=True)
class GatedConvolution:  # y = (sigmoid(x W_g) * conv(x W_x)) W_out
    width: int
    taps: int = 3
    kind: ClassVar[str] = "convolution"
    cache: ClassVar[type] = ConvolutionCache

    def params(self, width, variance):
        for name, v in (("gate", 1), ("value", 1), ("out", variance)):
            yield from params.under(name, params.linear((width, width), ("", ""), "recurrent", v))
        yield from params.under("conv_1d", params.conv_1d(width, self.taps))

    def state(self, capacity):
        yield params.StateSpec("state", (self.taps - 1, self.width), "compute", ("conv", "lru"))


def in_reference(mixer, weights, x, positions, state):
    gate, value = (reference.linear(reference.subtree(weights, n), x) for n in ("gate", "value"))
    w, b, state = weights["conv_1d.w"], weights["conv_1d.b"], state["state"]
    value, after = reference.conv_1d(value, w, b, positions, state)
    y, out = reference.sigmoid(gate) * value, reference.subtree(weights, "out")
    return reference.linear(out, y), {"state": after}


def in_torch(width, mixer, variance, scan_type, dtype):
    from recurrentgemma.torch.layers import Conv1D, Linear, SpecModule

    class Block(SpecModule):
        def forward(self: Any, x, segment_pos, cache=None):
            value, state = self.conv_1d(self.value(x), segment_pos, cache and cache[0])
            return self.out(self.gate(x).sigmoid() * value), ConvolutionCache(state)

    block = Block()
    block.gate, block.value = (Linear(width, width, dtype=dtype) for _ in range(2))
    block.conv_1d = Conv1D(width, mixer.taps, device="meta", dtype=dtype)
    block.out = Linear(width, width, True, variance, dtype)
    return block


def in_jax(width, mixer, variance, **settings):
    from recurrentgemma.jax.layers import Conv1D, SpecModule, nn

    class Block(SpecModule):
        @nn.compact
        def __call__(self, x, segment_pos, cache=None):
            value, sizes = self.linear("value", width, width)(x), (width, mixer.taps)
            convolve = self.child(Conv1D, "conv_1d", *sizes)
            value, state = convolve(value, segment_pos, cache and cache[0])
            y = nn.sigmoid(self.linear("gate", width, width)(x)) * value
            return self.linear("out", width, width, True, variance)(y), ConvolutionCache(state)

    return Block(**settings)


LAYERS = GatedConvolution(24), mixers.Attention(4, 2, 8, 6, mixers.Rope(), scale=0.3)
CONFIG = config.ModelConfig(2048, 24, tuple(config.Layer(mixer, 32, True) for mixer in LAYERS))


def test_the_whole_loop(twins, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixers.MIXERS, "convolution", GatedConvolution)
    monkeypatch.setitem(reference.MIXERS, GatedConvolution, in_reference)
    assert config.config_from_json(CONFIG.to_json()) == CONFIG
    assert memory.state_bytes(CONFIG, "float32") == 4 * (2 * 24 + 2 * 6 * 2 * 8 + 1)
    (tokens, places), weights = make_batch(CONFIG, 13), make_params(CONFIG)
    expected = reference.forward(CONFIG, weights, tokens, places)
    models: Any = []
    for backend in twins:
        path, twin, block = tmp_path / backend.name, backend.twin, globals()[f"in_{backend.name}"]
        monkeypatch.setitem(backend.module.blocks.MIXERS, GatedConvolution, block)
        drawn, samples = backend.init_params(CONFIG, 3), layer_spec.sample_params(CONFIG, 3)
        assert all(np.array_equal(drawn[spec.path], value) for spec, value in samples)
        network = backend.griffin(CONFIG, weights)
        _, state = network(tokens[:, :6], places[:, :6], reference.init_state(CONFIG, 3))
        logits, state = network(tokens[:, 6:], places[:, 6:], state)
        logits, wanted = (z[places[:, 6:] >= 0] for z in (logits, expected[0][:, 6:]))
        assert_close(logits, wanted, "logits", "float64")
        assert_close(state, expected[1], "state", "float64")
        model = twin.make(CONFIG, weights.items(), "float32")
        twin.save(path / "ours", model, load_tokenizer())
        convert(path / "ours", path / "flax", "kaggle-flax")
        convert(path / "flax", path / "back", "recurrentgemma")
        again = twin.load(path / "back", "float32")
        assert all(np.array_equal(v, twin.params(again)[k]) for k, v in twin.params(model).items())
        sampler = twin.sampler(again, load_tokenizer())
        sampler.save_state(path / "state", sampler.prefill("In the"))
        text = sampler.generate(sampler.load_state(path / "state"), 4).text
        assert text == sampler(["In the"], 4).text
        lora, ones = backend.module.LoraOptions(2, targets=("recurrent",), quantize=True), [[1] * 8]
        options = {"gradient_checkpointing": True, "state_dtype": "float32", "seed": 0}
        state = twin.train_state(again, lora=lora, **options)
        batch = backend.module.Batch(*map(np.array, (ones, [range(8)], ones, [[1.0] * 8])))
        state, first = twin.training.train_step(state, [batch])
        state, second = twin.training.train_step(state, [batch])
        assert second["loss"] < first["loss"]
        assert twin.params(twin.trained(state)).keys() == weights.keys()
        model = twin.make(CONFIG, weights.items(), "float64")
        models.append(lambda model=model, twin=twin: parity.TwinModel(twin, model))
    batch = parity.make_batch(CONFIG, 16)
    assert parity.compare(models[0], models[1], batch, "float64", gradients=True).within
