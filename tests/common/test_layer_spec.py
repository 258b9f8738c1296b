"""The table of parameters: shapes, counts, names and axis orders in each format."""

import math

import numpy as np
import pytest
from cases import CONFIGS, make_config

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
