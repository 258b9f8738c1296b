"""The engine of `recurrentgemma parity`: which models it calls the same."""

import json

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params
from comparing import compare_twins, make_model
from sweeps import sweep

from backends import BACKENDS, Backend
from recurrentgemma.common.model.activations import activation_names
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.parity import Report, compare, compare_tensors, default_length, make_batch
from recurrentgemma.parity.reading import CASES

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

import recurrentgemma.torch.scan.native

CONFIG = CONFIGS["griffin"]


def check(report: Report, config: GriffinConfig, inside: bool, gradients: bool) -> None:
    """Every tensor is there, and within its budget."""
    names = [*activation_names(config, inside), "logits"]
    for case in CASES:
        found = [row.name for row in report.rows if (row.case, row.kind) == (case, "activation")]
        assert found == names
    assert sum(row.kind == "parameter" for row in report.rows) == len(make_params(config))
    num_gradients = len(make_params(config)) if gradients else 0
    assert sum(row.kind == "gradient" for row in report.rows) == num_gradients
    worst = max(report.rows, key=lambda row: row.share)
    assert report.within, f"{worst.name} {worst.case}: {worst.share} of its budget"
    assert report.first_beyond is None


# The short profile has each config in one dtype: float32 and bfloat16 are held against float64.
@pytest.mark.parametrize(
    "name", sweep(["attention_last", "attention_first", "attention"], [*CONFIGS])
)
def test_float64(name: str) -> None:
    report = compare_twins(CONFIGS[name], make_params(CONFIGS[name]), "float64", inside=True)
    check(report, CONFIGS[name], inside=True, gradients=False)
    assert max(row.error.largest for row in report.rows) < 1e-12
    assert report.argmax_agreement == 1
    assert report.kl_divergence < 1e-15
    assert report.greedy_agreement == (32,) * 4


@pytest.mark.parametrize("name", sweep(["griffin"], ["griffin", "attention_last"]))
def test_float32(name: str) -> None:
    report = compare_twins(CONFIGS[name], make_params(CONFIGS[name]), "float32", gradients=True)
    check(report, CONFIGS[name], inside=False, gradients=True)
    assert report.argmax_agreement == 1
    assert report.greedy_agreement == (32,) * 4


@pytest.mark.parametrize("name", sweep(["recurrent"], ["griffin", "recurrent"]))
def test_bfloat16(name: str) -> None:
    report = compare_twins(CONFIGS[name], make_params(CONFIGS[name]), "bfloat16")
    check(report, CONFIGS[name], inside=False, gradients=False)


def test_the_order_of_activations() -> None:
    names = activation_names(CONFIGS["attention_last"], inside=True)
    assert names[:4] == (
        "embedder",
        "blocks.0.temporal_pre_norm",
        "blocks.0.recurrent_block.linear_y",
        "blocks.0.recurrent_block.linear_x",
    )
    assert names[-6:] == (
        "blocks.1.channel_pre_norm",
        "blocks.1.mlp_block.ffw_up",
        "blocks.1.mlp_block.ffw_down",
        "blocks.1.mlp_block",
        "blocks.1",
        "final_norm",
    )
    assert set(activation_names(CONFIGS["attention_last"])) < set(names)


def test_activations_add_up(backend: Backend) -> None:
    """A captured name is its module's output: the residual stream is the sum of the others."""
    model = make_model(backend, CONFIG, make_params(CONFIG), "float64")
    batch = make_batch(CONFIG, 24)
    names = activation_names(CONFIG)
    found, _ = model.run(batch.tokens, batch.segment_pos, None, names)
    assert list(found) == [*names, "logits"]
    x = found["embedder"]
    for i, kind in enumerate(CONFIG.block_types):
        x = x + found[f"blocks.{i}.{kind.value}_block"]
        x = x + found[f"blocks.{i}.mlp_block"]
        np.testing.assert_allclose(found[f"blocks.{i}"], x, rtol=1e-12)
    norm = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    scale = 1 + make_params(CONFIG)["final_norm.scale"]
    np.testing.assert_allclose(found["final_norm"], x / norm * scale, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_constant_shows_in_any_dtype(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(recurrentgemma.torch.scan.native, "RG_LRU_C", 8.0001)
    report = compare_twins(CONFIG, make_params(CONFIG), dtype, num_greedy=0)
    assert not report.within
    first = report.first_beyond
    assert first is not None
    assert (first.name, first.case) == ("blocks.0.recurrent_block", "one pass")
    assert first.wide.share > 10
    if dtype == "bfloat16":  # rounding alone would hide it
        assert first.error.share < 1


def test_parameters_must_be_the_same_number_for_number() -> None:
    params = make_params(CONFIG)
    other = dict(params) | {"final_norm.scale": params["final_norm.scale"] * (1 + 1e-15)}
    report = compare(
        lambda: make_model(BACKENDS["torch"], CONFIG, params, "float64"),
        lambda: make_model(BACKENDS["torch"], CONFIG, other, "float64"),
        make_batch(CONFIG, 24),
        "float64",
        num_greedy=0,
    )
    beyond = [(row.kind, row.name) for row in report.rows if not row.within]
    assert beyond == [("parameter", "final_norm.scale")]


def test_nan_is_beyond_any_budget() -> None:
    good, bad = np.ones(3), np.array([1, np.nan, 1])
    for dtype in ("float64", "float32"):
        assert compare_tensors(good, bad, good, dtype).share == np.inf
        assert compare_tensors(bad, good, good, dtype).share == np.inf
        assert compare_tensors(good, good, bad, dtype).share == np.inf
        assert compare_tensors(good, good, good + 1e-9, dtype).share == 0


def test_the_budget_is_that_of_the_better_model() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal(1000)
    noise = 1e-6 * rng.standard_normal((2, 1000))
    alike = compare_tensors(true + noise[0], true + noise[1], true, "float32")
    assert 0.2 < alike.share < 0.6
    worse = compare_tensors(true + noise[0], true + 5 * noise[1], true, "float32")
    assert worse.share > 1
    assert worse.budget < 1.1 * alike.budget


def test_the_report_is_json() -> None:
    report = compare_twins(CONFIG, make_params(CONFIG), "float32", num_greedy=2)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["within_budget"] is True
    assert told["first_beyond"] is None
    assert len(told["tensors"]) == len(report.rows)
    assert told["greedy_agreement"] == [2] * 4


def test_rows_leave_the_window_behind() -> None:
    assert default_length(CONFIG) == CONFIG.attention_window_size + 64
    assert default_length(CONFIGS["recurrent"]) == 64
    assert default_length(make_config(attention_window_size=2048)) == 512


@pytest.mark.parametrize("length", [12, 13, 24, 192])
def test_documents_start_in_every_part_of_a_batch(length: int) -> None:
    batch = make_batch(CONFIG, length)
    assert sum(batch.chunks) == length
    assert batch.num_steps == batch.chunks.count(1) >= 3
    first, second, steps = np.split(batch.segment_pos[1], np.cumsum(batch.chunks[:2]))
    assert first[0] == 0
    assert (first[1:] == 0).any()
    assert (second == 0).any()
    assert second[-1] == 1  # too short to fill the convolution's state
    assert (steps == 0).any()
    assert [int((row < 0).sum()) for row in batch.segment_pos] == [
        0,
        0,
        3,
        length - max(length // 8, 5),
    ]
