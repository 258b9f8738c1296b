"""The table of parameters: shapes, counts, names and axis orders in each format."""

import math

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params

from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.init import Normal, RingLog, Zeros
from recurrentgemma.common.model.layer_spec import (
    layer_spec,
    mismatches,
    num_parameters,
    require_match,
    sample_param,
    sample_params,
    spec_by_path,
)
from recurrentgemma.common.model.presets import Preset, TemporalBlockType

CONFIG = make_config("RA", width=40, lru_width=24, mlp_expanded_width=36, vocab_size=50)


def test_shapes() -> None:
    """All of them, written out."""
    mlp = {
        "temporal_pre_norm.scale": (40,),
        "channel_pre_norm.scale": (40,),
        "mlp_block.ffw_up.w": (2, 40, 36),
        "mlp_block.ffw_up.b": (2, 1, 1, 36),
        "mlp_block.ffw_down.kernel": (36, 40),
        "mlp_block.ffw_down.bias": (40,),
    }
    recurrent = {
        "linear_y.kernel": (40, 24),
        "linear_y.bias": (24,),
        "linear_x.kernel": (40, 24),
        "linear_x.bias": (24,),
        "linear_out.kernel": (24, 40),
        "linear_out.bias": (40,),
        "conv_1d.w": (4, 24),
        "conv_1d.b": (24,),
        "rg_lru.a_param": (24,),
        "rg_lru.input_gate.w": (2, 12, 12),
        "rg_lru.input_gate.b": (2, 12),
        "rg_lru.a_gate.w": (2, 12, 12),
        "rg_lru.a_gate.b": (2, 12),
    }
    attention = {
        "proj_q.kernel": (40, 40),
        "proj_k.kernel": (40, 20),
        "proj_v.kernel": (40, 20),
        "proj_final.kernel": (40, 40),
        "proj_final.bias": (40,),
    }
    expected = {"embedder.input_embedding": (50, 40), "final_norm.scale": (40,)}
    expected |= {f"blocks.{i}.{path}": shape for i in (0, 1) for path, shape in mlp.items()}
    expected |= {f"blocks.0.recurrent_block.{path}": shape for path, shape in recurrent.items()}
    expected |= {f"blocks.1.attention_block.{path}": shape for path, shape in attention.items()}
    specs = layer_spec(CONFIG)
    assert {spec.path: spec.shape for spec in specs} == expected
    assert len(specs) == len(expected)
    assert (specs[0].path, specs[-1].path) == ("embedder.input_embedding", "final_norm.scale")
    assert num_parameters(CONFIG) == sum(math.prod(shape) for shape in expected.values())
    assert spec_by_path(CONFIG)["final_norm.scale"] == specs[-1]


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (Preset.RECURRENT_GEMMA_2B_V1, 2_682_862_080),
        (Preset.RECURRENT_GEMMA_9B_V1, None),
        (Preset.GRIFFIN_PAPER_7B, None),
        (Preset.HAWK_PAPER_7B, None),
    ],
)
def test_parameter_counts(preset: Preset, count: int | None) -> None:
    """By a formula of its own; of the 2B model, also by what its checkpoint holds."""
    c = GriffinConfig.from_preset(preset)
    recurrent = c.block_types.count(TemporalBlockType.RECURRENT)
    attention = c.num_layers - recurrent
    gates = 2 * (c.lru_width**2 // c.num_heads + c.lru_width)
    per_recurrent = 3 * c.width * c.lru_width + 2 * c.lru_width + c.width + 6 * c.lru_width + gates
    per_attention = 2 * c.width**2 + 2 * c.width * c.head_dim + c.width
    per_mlp = 3 * c.width * c.mlp_expanded_width + 2 * c.mlp_expanded_width + c.width
    expected = (
        c.vocab_size * c.width
        + recurrent * per_recurrent
        + attention * per_attention
        + c.num_layers * (per_mlp + 2 * c.width)
        + c.width
    )
    assert num_parameters(c) == expected
    assert count in (None, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_axis_has_a_name_and_every_name_one_parameter(name: str) -> None:
    specs = layer_spec(CONFIGS[name])
    for spec in specs:
        assert len(spec.axes) == len(spec.shape), spec.path
        assert spec.size == math.prod(spec.shape)
    assert len({spec.path for spec in specs}) == len(specs)
    assert len({spec.torch.name for spec in specs}) == len(specs)
    names = [stored.name for spec in specs for stored in spec.hf]
    assert len(set(names)) == len(names)


def test_names_and_axis_orders_in_the_formats() -> None:
    """The published names; T marks the transpose."""
    specs = spec_by_path(make_config("RA"))
    params = make_params(make_config("RA"))
    block = "blocks.0.recurrent_block"
    layer = "model.layers.0"
    same = [
        ("embedder.input_embedding", "embedder.input_embedding", "model.embed_tokens.weight"),
        ("final_norm.scale", "final_norm.scale", "model.final_norm.weight"),
        (f"{block}.rg_lru.a_param", None, f"{layer}.temporal_block.rg_lru.recurrent_param"),
        (f"{block}.rg_lru.a_gate.w", None, f"{layer}.temporal_block.rg_lru.recurrent_gate_weight"),
        (f"{block}.rg_lru.a_gate.b", None, f"{layer}.temporal_block.rg_lru.recurrent_gate_bias"),
        (f"{block}.rg_lru.input_gate.w", None, f"{layer}.temporal_block.rg_lru.input_gate_weight"),
        (f"{block}.linear_x.bias", None, f"{layer}.temporal_block.linear_x.bias"),
        (f"{block}.conv_1d.b", None, f"{layer}.temporal_block.conv_1d.bias"),
        ("blocks.0.temporal_pre_norm.scale", None, f"{layer}.temporal_pre_norm.weight"),
        ("blocks.1.channel_pre_norm.scale", None, "model.layers.1.channel_pre_norm.weight"),
        ("blocks.0.mlp_block.ffw_down.bias", None, f"{layer}.mlp_block.down_proj.bias"),
    ]
    for path, torch_name, hf_name in same:
        spec, value = specs[path], params[path]
        assert spec.torch.name == (torch_name or path)
        (hf,) = spec.hf
        assert hf.name == hf_name
        np.testing.assert_array_equal(spec.torch.encode(value), value)
        np.testing.assert_array_equal(hf.encode(value), value)
    transposed = [
        (f"{block}.linear_out", f"{layer}.temporal_block.linear_out.weight"),
        ("blocks.1.attention_block.proj_q", "model.layers.1.temporal_block.q_proj.weight"),
        ("blocks.1.attention_block.proj_k", "model.layers.1.temporal_block.k_proj.weight"),
        ("blocks.1.attention_block.proj_final", "model.layers.1.temporal_block.o_proj.weight"),
        ("blocks.0.mlp_block.ffw_down", f"{layer}.mlp_block.down_proj.weight"),
    ]
    for path, hf_name in transposed:
        spec, value = specs[f"{path}.kernel"], params[f"{path}.kernel"]
        assert spec.torch.name == f"{path}.weight"
        (hf,) = spec.hf
        assert hf.name == hf_name
        np.testing.assert_array_equal(spec.torch.encode(value), value.T)
        np.testing.assert_array_equal(hf.encode(value), value.T)
    value = params[f"{block}.conv_1d.w"]
    np.testing.assert_array_equal(specs[f"{block}.conv_1d.w"].torch.encode(value), value)
    np.testing.assert_array_equal(specs[f"{block}.conv_1d.w"].hf[0].encode(value), value.T[:, None])
    up_w, up_b = (specs[f"blocks.0.mlp_block.ffw_up.{leaf}"] for leaf in "wb")
    for half, name in enumerate(("gate_proj", "up_proj")):
        w, b = params[up_w.path], params[up_b.path]
        assert up_w.hf[half].name == f"{layer}.mlp_block.{name}.weight"
        assert up_b.hf[half].name == f"{layer}.mlp_block.{name}.bias"
        np.testing.assert_array_equal(up_w.hf[half].encode(w), w[half].T)
        np.testing.assert_array_equal(up_b.hf[half].encode(b), b[half, 0, 0])
    np.testing.assert_array_equal(up_w.torch.encode(params[up_w.path]), params[up_w.path])


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_undoes_encode(name: str) -> None:
    config = CONFIGS[name]
    for spec in layer_spec(config):
        value = make_params(config)[spec.path]
        stored = spec.torch.encode(value)
        assert stored.shape == spec.torch.shape
        np.testing.assert_array_equal(spec.torch.decode(stored, spec), value)
        parts = []
        for part in spec.hf:
            stored = part.encode(value)
            assert stored.shape == part.shape
            parts.append(part.decode(stored, spec))
        restored = np.stack(parts) if len(parts) > 1 else parts[0]
        np.testing.assert_array_equal(restored, value, err_msg=spec.path)


def test_weight_decay_is_for_matrices_and_taps() -> None:
    for spec in layer_spec(make_config("RA")):
        decays = spec.path.endswith((".kernel", "ffw_up.w", "conv_1d.w"))
        assert spec.decay == decays, spec.path


def test_samples() -> None:
    values = {spec.path: value for spec, value in sample_params(CONFIG, 5)}
    for spec in layer_spec(CONFIG):
        value = values[spec.path]
        assert value.dtype == np.float32
        assert value.shape == spec.shape
        np.testing.assert_array_equal(sample_param(spec, 5), value)
        kind = Zeros if not value.any() else RingLog if "a_param" in spec.path else Normal
        assert isinstance(spec.init, kind), spec.path
    # A parameter is the same whatever else the model has.
    other = {s.path: value for s, value in sample_params(make_config("RA", width=40), 5)}
    path = "blocks.0.recurrent_block.linear_x.kernel"
    assert other[path].shape != values[path].shape
    same = make_config("RR", width=40, lru_width=24, mlp_expanded_width=36, vocab_size=50)
    again = {s.path: value for s, value in sample_params(same, 5)}
    np.testing.assert_array_equal(again[path], values[path])
    assert (again[path] != again[path.replace("blocks.0", "blocks.1")]).any()


def test_every_mismatch_is_named() -> None:
    expected = {"a": (1, 2), "b": (3,), "c": (4,)}
    actual = {"b": (3,), "c": (5,), "d": (6,)}
    problems = ["missing a (1, 2)", "unexpected d (6,)", "c must have shape (4,), got (5,)"]
    assert mismatches(expected, actual) == problems
    with pytest.raises(ValueError, match=r"do not match the config \(3 differences\)") as caught:
        require_match(expected, actual)
    for problem in problems:
        assert problem in str(caught.value)
    require_match(expected, dict(expected))
