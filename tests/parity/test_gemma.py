"""Gemma 1, 2 and 3: what was published of them, and any member of each family."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_batch, make_params, next_token_loss
from checkpoints import decoded
from comparing import compare_twins
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sweeps import fewer_in_jax, sweep

from backends import Backend
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.gemma import VERSIONS, GemmaConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.presets import AttentionType
from recurrentgemma_conversion import Format, open_checkpoint
from tolerances import assert_close

GOLDEN = Path(__file__).parents[2] / "../shared/golden/gemma"
MODELS = ["gemma1_mqa", "gemma1_mha", "gemma2", "gemma3_mqa", "gemma3_gqa"]

published = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden data is not at ../shared/golden/gemma"
)


# ---------------------------------------------------------------------------------- published


@functools.cache
def golden(model: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / model / "outputs.npz") as outputs:
        return dict(outputs)


@functools.cache
def golden_model(model: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The config, and the weights in float64."""
    with open_checkpoint(GOLDEN / model) as checkpoint:
        assert isinstance(checkpoint.config, GemmaConfig)
        params = {spec.path: value.astype(np.float64) for spec, value in checkpoint}
        return checkpoint.config, params


def tolerance(model: str) -> str:
    return "golden Gemma 2" if model == "gemma2" else "golden Gemma"


def batch(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Two whole rows, and three that are left-padded; longer than the window."""
    want = golden(model)
    whole = np.tile(np.arange(40), (2, 1))
    padded = np.where(want["pad_mask"], want["pad_positions"], -1)
    tokens = np.concatenate([want["tokens"], want["pad_tokens"]])
    return tokens.astype(np.int32), np.concatenate([whole, padded]).astype(np.int32)


@functools.cache
def make(backend: Backend, model: str) -> Any:
    return backend.griffin(*golden_model(model), "float32", gradient_checkpointing=True)


@published
@pytest.mark.parametrize("model", MODELS)
def test_the_reference_agrees_with_what_was_published(model: str) -> None:
    want, (config, params), (tokens, segment_pos) = golden(model), golden_model(model), batch(model)
    logits, _ = reference.forward(config, params, tokens, segment_pos)
    expected = np.concatenate([want["logits"], want["pad_logits"]])
    assert_close(logits, expected, "logits", tolerance(model))


@published
@pytest.mark.parametrize("model", MODELS)
def test_published_logits(backend: Backend, model: str) -> None:
    want, (tokens, segment_pos) = golden(model), batch(model)
    logits, _ = make(backend, model)(tokens, segment_pos)
    expected, real = np.concatenate([want["logits"], want["pad_logits"]]), segment_pos >= 0
    assert_close(logits[real], expected[real], "logits", tolerance(model))


@published
@pytest.mark.parametrize("model", MODELS)
def test_published_decoding(backend: Backend, model: str) -> None:
    """32 tokens, then eight steps on a cache; and from there the likeliest tokens.

    The 32 come behind padding, so that JAX has compiled a batch of this length.
    """
    want, run, (tokens, segment_pos) = golden(model), make(backend, model), batch(model)
    padding = ((0, 0), (8, 0))
    logits, prefilled = run(
        np.pad(tokens[:, :32], padding), np.pad(segment_pos[:, :32], padding, constant_values=-1)
    )
    last = logits[:, -1]
    expected = np.concatenate([want["prefill_logits"], want["pad_prefill_logits"]])
    assert_close(last, expected, "logits", tolerance(model))
    decoded, state = [], prefilled
    for t in range(32, 40):
        logits, state = run(tokens[:, t : t + 1], segment_pos[:, t : t + 1], state)
        decoded.append(logits)
    expected = np.concatenate([want["decode_logits"], want["pad_decode_logits"]])
    assert_close(np.concatenate(decoded, 1), expected, "logits", tolerance(model))
    chosen, state, place = [], prefilled, segment_pos[:, 31:32]
    for _ in range(want["greedy"].shape[1]):
        chosen.append(last.argmax(-1)[:, None].astype(np.int32))
        place = place + 1
        logits, state = run(chosen[-1], place, state)
        last = logits[:, -1]
    np.testing.assert_array_equal(np.concatenate(chosen, 1)[:2], want["greedy"])


@published
@pytest.mark.parametrize(
    ("backend", "model"),
    fewer_in_jax(MODELS, ["gemma1_mha", "gemma2", "gemma3_gqa"]),
    indirect=["backend"],
)
def test_published_loss_and_every_gradient(backend: Backend, model: str) -> None:
    want, (config, _), (tokens, segment_pos) = golden(model), golden_model(model), batch(model)
    run = make(backend, model)
    logits, state = run(tokens, segment_pos)
    loss, dlogits = next_token_loss(logits[:2], tokens[:2], np.ones((2, 39)))
    np.testing.assert_allclose(loss, want["loss"], rtol=0, atol=1e-5)
    nothing = {
        block: {field: np.zeros_like(leaf) for field, leaf in fields.items()}
        for block, fields in state.items()
    }
    dy = np.concatenate([dlogits, np.zeros((3, *dlogits.shape[1:]))])
    given = run.grads(tokens, segment_pos, dy=dy, dstate=nothing)["params"]
    names = load_file(GOLDEN / model / "model.safetensors")
    theirs = decoded(config, Format.HUGGINGFACE, {name: want[f"grad/{name}"] for name in names})
    expected = {path: theirs[path] for path in sorted(theirs)}
    assert_close(given, expected, "gradient", "golden")


# ------------------------------------------------------------------------------- any member


@st.composite
def members(draw: st.DrawFn, version: int) -> GemmaConfig:
    """A small member of a family: any heads, patterns, windows, scales, ropes and caps.

    The simplest example, which is the only one in the short profile, has some of everything.
    """
    kv_heads, groups = draw(st.sampled_from([(2, 2), (1, 1), (1, 3), (2, 1)]))
    kinds = st.lists(st.sampled_from(AttentionType), min_size=1, max_size=3)
    both = st.just([AttentionType.SLIDING, AttentionType.FULL])
    caps = st.sampled_from([2.0, 0.0, 30.0])
    return GemmaConfig(
        version=version,
        vocab_size=31,
        width=draw(st.sampled_from([20, 24])),
        mlp_width=28,
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([6, 2, 8])),
        layer_types=tuple(draw(both | kinds)),
        sliding_window=draw(st.sampled_from([6, *range(2, 10)])),
        query_pre_attn_scalar=draw(st.sampled_from([12.5, 1.0, 8.0])),
        rope_base=draw(st.sampled_from([1e2, 1e6])),
        rope_stretch=draw(st.sampled_from([8.0, 1.0])),
        attention_soft_cap=draw(caps),
        logits_soft_cap=draw(caps),
    )


STEP = slice(20, 21)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=sweep(1, 30))
@given(data=st.data())
def test_any_member_and_any_split(
    twins: tuple[Backend, Backend], version: int, data: st.DataObject
) -> None:
    """Logits, states and gradients; the rows are whole, packed and left-padded, read in parts."""
    config = data.draw(members(version))
    cut = data.draw(st.sampled_from([9, *range(1, 21)]))
    params = make_params(config, seed=version)
    tokens, segment_pos = make_batch(config, 21)
    expected, expected_state = reference.forward(config, params, tokens, segment_pos)
    real = segment_pos >= 0
    dy = np.random.default_rng(cut).standard_normal(expected.shape) * real[..., None]
    gradients = []
    for backend in twins:
        model = backend.griffin(config, params)
        logits, state = model(tokens, segment_pos)
        assert_close(logits[real], expected[real], "logits", "float64")
        assert_close(state, expected_state, "state", "float64")
        parts, state = [], None
        for part in sweep((slice(0, cut), slice(cut, 21)), (slice(0, cut), slice(cut, 20), STEP)):
            if part.start < part.stop:
                out, state = model(tokens[:, part], segment_pos[:, part], state)
                parts.append(out)
        assert_close(np.concatenate(parts, 1)[real], expected[real], "logits", "float64")
        assert_close(state, expected_state, "state", "float64")
        gradients.append(model.grads(tokens, segment_pos, dy=dy, dstate=expected_state))
    one, other = gradients
    assert_close(one, other, "gradient", "float64")


WHOLE: dict[str, Any] = {"dtype": "float32", "gradients": True, "inside": True}
COMPARED = {1: {"dtype": "float64"}, 2: {"dtype": "float64", "inside": True}, 3: WHOLE}


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_compares_all_of_a_model(twins: tuple[Backend, Backend], version: int) -> None:
    """States that grow, in two dtypes; every gradient, and the insides of blocks."""
    del twins  # both are installed
    # Budgets are statistics of a tensor's values: norms of six values would have too few.
    config = GemmaConfig.from_sizes(version, 31, 20, 28, 2, 4, 2, 16, sliding_window=6)
    kwargs = sweep(COMPARED[version], WHOLE)
    report = compare_twins(config, make_params(config), length=24, num_greedy=4, **kwargs)
    assert report.within, report.first_beyond
    assert len(report.rows) > len(layer_spec(config))


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 12])
def test_the_reference_reads_any_split_alike(cut: int) -> None:
    """The window is six keys: five before a query's own."""
    config = GemmaConfig.from_sizes(3, 31, 20, 28, 7, 4, 2, 6, sliding_window=6)
    params, (tokens, segment_pos) = make_params(config), make_batch(config, 21)
    expected, expected_state = reference.forward(config, params, tokens, segment_pos)
    state = reference.init_state(config, 3)
    assert state["blocks.0"]["keys"].shape[1] == 5
    first, state = reference.forward(config, params, tokens[:, :cut], segment_pos[:, :cut], state)
    rest, state = reference.forward(config, params, tokens[:, cut:], segment_pos[:, cut:], state)
    assert_close(np.concatenate([first, rest], 1), expected, "logits", "float64")
    assert_close(state, expected_state, "state", "float64")
