"""The reference against the published implementations' outputs, its own ledger, and itself."""

import functools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec, sample_params
from recurrentgemma.common.model.mixers import Rope
from recurrentgemma.common.model.numerics import to_bfloat16
from recurrentgemma_conversion import Format

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
CASES = ("prompt", "packed", "short")
BLOCKS = {"R": "recurrent", "A": "attention"}


def make_config(blocks="RAR", **changes) -> GriffinConfig:
    fields = {
        "vocab_size": 29,
        "width": 16,
        "mlp_expanded_width": 20,
        "num_heads": 2,
        "lru_width": 12,
        "block_types": tuple(BLOCKS[letter] for letter in blocks),
        "embeddings_scale_by_sqrt_dim": True,
        "attention_window_size": 5,
        "logits_soft_cap": 5.0,
    }
    return GriffinConfig(**fields | changes)


@functools.cache
def make_params(config: GriffinConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial values with noise on all of them, so that no bias or scale is zero; read-only."""
    rng = np.random.default_rng(seed)
    params = {}
    for spec, value in sample_params(config, seed):
        params[spec.path] = value + 0.2 * rng.standard_normal(spec.shape)
        params[spec.path].flags.writeable = False
    return params


def make_tokens(config: GriffinConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(config.vocab_size, size=shape)


def forward(config, tokens, segment_pos, state=None):
    return reference.forward(
        config, make_params(config), np.asarray(tokens), np.asarray(segment_pos), state
    )


def leaves(state: reference.State, row: int | None = None) -> dict[str, np.ndarray]:
    rows = slice(None) if row is None else row
    return {f"{b}.{f}": leaf[rows] for b, fields in state.items() for f, leaf in fields.items()}


def assert_same(actual: dict, expected: dict, atol: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        np.testing.assert_allclose(
            actual[name], expected[name], rtol=1e-12, atol=atol, err_msg=name
        )


# ------------------------------------------------------------------------------------ golden data


@functools.cache
def golden_model() -> tuple[GriffinConfig, dict[str, np.ndarray]]:
    """The tiny model, its weights from the Hugging Face file through its table of names."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden data is not at ../shared/golden")
    config = GriffinConfig.from_json((GOLDEN / "outputs/tiny.config.json").read_text())
    stored = load_file(GOLDEN / "hf/tiny/model.safetensors")
    return config, decoded(config, Format.HUGGINGFACE, stored)


@functools.cache
def golden_outputs(case: str) -> dict[str, np.ndarray]:
    golden_model()  # skips when there is no data
    with np.load(GOLDEN / f"outputs/tiny.{case}.npz") as outputs:
        return dict(outputs)


@functools.cache
def golden_run(
    case: str,
) -> tuple[np.ndarray, reference.State, np.ndarray, reference.State]:
    config, params = golden_model()
    want = golden_outputs(case)
    logits, state = reference.forward(config, params, want["tokens"], want["segment_pos"])
    decoded, decoded_state = reference.forward(
        config, params, want["decode_tokens"], want["decode_pos"], state
    )
    return logits, state, decoded, decoded_state


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case):
    want = golden_outputs(case)
    logits, _, decoded, _ = golden_run(case)
    real = want["segment_pos"] >= 0
    np.testing.assert_allclose(logits[real], want["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded, want["decode_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("when", ["cache", "cache_after_decode"])
def test_golden_state(case, when):
    config, _ = golden_model()
    want = golden_outputs(case)
    _, prefilled, _, decoded = golden_run(case)
    state = prefilled if when == "cache" else decoded
    names = {f"{when}/{block}/{field}" for block, fields in state.items() for field in fields}
    assert names == {name for name in want if name.startswith(f"{when}/")}
    for block, fields in state.items():
        golden = {field: want[f"{when}/{block}/{field}"] for field in fields}
        assert_shapes_equal(fields, golden)
        if "keys" not in fields:
            for field, leaf in fields.items():
                np.testing.assert_allclose(leaf, golden[field], rtol=0, atol=2e-5, err_msg=field)
            continue
        np.testing.assert_array_equal(fields["num_tokens"], golden["num_tokens"])
        for row, seen in enumerate(fields["num_tokens"]):
            # The published cache orders its slots differently, and may keep older documents'.
            kept = np.arange(max(0, seen - config.max_cache_length), seen) % config.max_cache_length
            key, value = fields["keys"][row, kept, 0], fields["values"][row, kept, 0]
            golden_key, golden_value = golden["keys"][row, :, 0], golden["values"][row, :, 0]
            apart = np.abs(key[:, None] - golden_key).max(axis=-1)
            slot = apart.argmin(axis=-1)
            assert len(set(slot)) == len(kept)
            np.testing.assert_allclose(key, golden_key[slot], rtol=0, atol=2e-5)
            np.testing.assert_allclose(value, golden_value[slot], rtol=0, atol=2e-5)


def assert_shapes_equal(actual, expected):
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}


def loss(config, params, case: str) -> float:
    """Mean cross-entropy of the next tokens that the mask selects."""
    want = golden_outputs(case)
    logits, _ = reference.forward(config, params, want["tokens"], want["segment_pos"])
    logits = logits[:, :-1]
    target = np.take_along_axis(logits, want["tokens"][:, 1:, None], axis=-1)[..., 0]
    nll = np.log(np.sum(np.exp(logits), axis=-1)) - target
    return np.sum(nll * want["loss_mask"]) / np.sum(want["loss_mask"])


@pytest.mark.parametrize("case", CASES)
def test_golden_loss(case):
    np.testing.assert_allclose(
        loss(*golden_model(), case), golden_outputs(case)["loss"], rtol=0, atol=1e-5
    )


def test_golden_gradients_are_the_slopes_of_the_reference():
    """Along the golden gradient plus a random direction, for each parameter by itself."""
    case = "packed"
    config, params = golden_model()
    params = {path: value.astype(np.float64) for path, value in params.items()}
    rng = np.random.default_rng(0)
    for spec in layer_spec(config):
        name = "grad/" + spec.path.replace(".", "/").replace("blocks/", "blocks.")
        grad = golden_outputs(case)[name].astype(np.float64)
        noise = rng.standard_normal(spec.shape)
        direction = grad / np.linalg.norm(grad) + noise / np.linalg.norm(noise)
        step = 1e-5
        above, below = (
            loss(config, params | {spec.path: params[spec.path] + sign * step * direction}, case)
            for sign in (1, -1)
        )
        slope = (above - below) / (2 * step)
        np.testing.assert_allclose(
            slope, np.sum(grad * direction), rtol=1e-4, atol=5e-5, err_msg=spec.path
        )


def test_golden_sampling():
    """Greedy continuations of single prompts: the tokens and the logits they were chosen from."""
    config, params = golden_model()
    want = golden_outputs("sampler")
    for i in range(len(want["prompts"])):
        prompt, tokens = want[f"prompt_ids_{i}"], want[f"tokens_{i}"]
        sequence = np.concatenate([prompt, tokens[:-1]])[None]
        logits, _ = reference.forward(config, params, sequence, np.arange(sequence.size)[None])
        logits = logits[0, len(prompt) - 1 :]
        np.testing.assert_allclose(logits, want[f"logits_{i}"], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(logits.argmax(axis=-1), tokens)


# --------------------------------------------------------------------------------- any split, same


@st.composite
def split_batches(draw):
    """A config; rows of document lengths; for each row, where its tokens are cut into chunks."""
    blocks = draw(st.sampled_from(["R", "A", "AR", "RA", "RAR", "AA"]))
    config = make_config(blocks, attention_window_size=draw(st.integers(1, 6)))
    rows = draw(
        st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=3), min_size=1, max_size=3)
    )
    chunks = draw(st.integers(1, 5))
    cuts = []
    for lengths in rows:
        cut = st.lists(st.integers(0, sum(lengths)), min_size=chunks - 1, max_size=chunks - 1)
        cuts.append([0, *sorted(draw(cut)), sum(lengths)])
    padding = draw(st.lists(st.integers(0, 3), min_size=chunks, max_size=chunks))
    return config, rows, np.array(cuts), padding


@given(split_batches())
@settings(deadline=None, max_examples=60)
def test_any_split_padding_and_packing_is_each_document_alone(batch):
    config, rows, cuts, padding = batch
    tokens = [make_tokens(config, sum(lengths)) for lengths in rows]
    positions = [np.concatenate([np.arange(n) for n in lengths]) for lengths in rows]

    state, logits = None, [[] for _ in rows]
    for i, extra in enumerate(padding):
        sizes = cuts[:, i + 1] - cuts[:, i]
        length = sizes.max() + extra
        chunk = np.full((len(rows), length), -7)  # padding may hold anything
        segment_pos = np.full((len(rows), length), -1)
        for row, size in enumerate(sizes):
            taken = slice(cuts[row, i], cuts[row, i + 1])
            chunk[row, length - size :] = tokens[row][taken]
            segment_pos[row, length - size :] = positions[row][taken]
        out, state = forward(config, chunk, segment_pos, state)
        assert not out[segment_pos < 0].any()
        for row, size in enumerate(sizes):
            logits[row].append(out[row, length - size :])

    assert state is not None
    for row, lengths in enumerate(rows):
        alone, alone_state = [], None
        for document in np.split(tokens[row], np.cumsum(lengths)[:-1]):
            out, alone_state = forward(config, document[None], np.arange(len(document))[None])
            alone.append(out[0])
        assert alone_state is not None
        np.testing.assert_allclose(
            np.concatenate(logits[row]), np.concatenate(alone), rtol=1e-12, atol=1e-12
        )
        assert_same(leaves(state, row), leaves(alone_state, 0))


def test_padding_leaves_the_state_alone():
    config = make_config()
    tokens = make_tokens(config, 2, 8)
    _, before = forward(config, tokens, np.tile(np.arange(8), (2, 1)))
    logits, after = forward(config, tokens[:, :3], np.full((2, 3), -1), before)
    assert not logits.any()
    assert_same(leaves(after), leaves(before), atol=0)


@pytest.mark.parametrize("state_known", [False, True])
def test_no_tokens(state_known):
    config = make_config()
    state = forward(config, [[1, 2], [3, 4]], [[0, 1], [-1, 0]])[1] if state_known else None
    logits, after = forward(config, np.zeros((2, 0), int), np.zeros((2, 0), int), state)
    assert logits.shape == (2, 0, config.vocab_size)
    assert_same(leaves(after), leaves(state or reference.init_state(config, 2)), atol=0)


def test_inputs_are_not_changed_and_outputs_are_new():
    config = make_config()
    tokens, segment_pos = make_tokens(config, 2, 4), np.array([[4, 5, 6, 7], [-1, -1, 4, 0]])
    state = forward(config, tokens, np.tile(np.arange(4), (2, 1)))[1]
    for array in (tokens, segment_pos, *leaves(state).values()):
        array.flags.writeable = False  # a write would raise
    _, after = forward(config, tokens, segment_pos, state)
    for name, leaf in leaves(after).items():
        assert not np.shares_memory(leaf, leaves(state)[name])


def test_a_document_may_start_without_its_history():
    config = make_config()
    tokens, segment_pos = make_tokens(config, 1, 4), np.arange(7, 11)[None]
    logits, state = forward(config, tokens, segment_pos)
    first, middle = forward(config, tokens[:, :1], segment_pos[:, :1])
    rest, split_state = forward(config, tokens[:, 1:], segment_pos[:, 1:], middle)
    np.testing.assert_allclose(logits, np.concatenate([first, rest], axis=1), rtol=1e-12)
    assert_same(leaves(split_state), leaves(state))
    assert state["blocks.1"]["num_tokens"] == 4
    # Slots of positions 7 ... 10 at a window of 5: 2, 3, 4, 0.
    assert state["blocks.1"]["keys"].any(axis=(0, 2, 3)).tolist() == [True, False, True, True, True]


# ------------------------------------------------------------------------- documents stay separate


def test_position_zero_forgets_the_state_whatever_it_held():
    config = make_config("RAR")
    tokens, segment_pos = make_tokens(config, 1, 9), np.arange(9)[None]
    spoilt = reference.init_state(config, 1)
    for block in spoilt.values():
        for leaf in block.values():
            leaf[...] = 3 if leaf.dtype == np.int32 else np.nan
    want, want_state = forward(config, tokens, segment_pos)
    logits, state = forward(config, tokens, segment_pos, spoilt)
    np.testing.assert_array_equal(logits, want)
    assert_same(leaves(state), leaves(want_state), atol=0)


@pytest.mark.parametrize("blocks", ["R", "A"])
def test_documents_in_a_row_do_not_see_each_other(blocks):
    config = make_config(blocks, attention_window_size=20)
    tokens = make_tokens(config, 1, 8)
    changed = tokens.copy()
    changed[0, 3] = (changed[0, 3] + 1) % config.vocab_size
    packed, single = np.array([[0, 1, 2, 3, 0, 1, 2, 3]]), np.arange(8)[None]
    for segment_pos, reach in ((packed, 4), (single, 8)):
        before, after = (forward(config, t, segment_pos)[0][0] for t in (tokens, changed))
        differs = np.abs(before - after).max(axis=-1) > 0
        assert np.flatnonzero(differs).tolist() == list(range(3, reach))


def test_conv_state_holds_only_the_current_document():
    config = make_config("R")
    tokens = make_tokens(config, 1, 7)
    state = forward(config, tokens, [[0, 1, 2, 3, 4, 0, 1]])[1]["blocks.0"]["conv1d_state"]
    assert state.any(axis=(0, 2)).tolist() == [False, True, True]


# ---------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("window", [1, 5])
def test_the_window_admits_the_query_and_w_before_it(window):
    config = make_config("A", attention_window_size=window)
    tokens = make_tokens(config, 1, 12)
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % config.vocab_size
    before, after = (forward(config, t, np.arange(12)[None])[0][0] for t in (tokens, changed))
    differs = np.abs(before - after).max(axis=-1) > 0
    assert differs.tolist() == [position <= window for position in range(12)]


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (math.sqrt(2560), 50.5),
        (math.sqrt(4096), 64.0),
        (math.sqrt(64), 8.0),
        (257.0, 256.0),  # a tie, to even
        (259.0, 260.0),  # a tie, to even
        (511.5, 512.0),  # up into the next binade
    ],
)
def test_to_bfloat16(x, rounded):
    assert to_bfloat16(x) == rounded


def test_to_bfloat16_is_that_of_ml_dtypes():
    import ml_dtypes

    roots = np.sqrt(np.arange(1, 10_000))
    want = roots.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert [to_bfloat16(x) for x in roots] == want.tolist()


@pytest.mark.parametrize(("width", "scale"), [(2560, 50.5), (4096, 64.0), (96, 9.8125)])
def test_embedding_scale_is_rounded_and_optional(width, scale):
    table, tokens = np.ones((29, width), np.float32), np.array([[3, 1]])
    config = make_config(width=width, num_heads=8, lru_width=8)
    np.testing.assert_array_equal(
        reference.embed(config, table, tokens), np.full((1, 2, width), scale)
    )
    config = make_config(width=width, num_heads=8, lru_width=8, embeddings_scale_by_sqrt_dim=False)
    np.testing.assert_array_equal(reference.embed(config, table, tokens), np.ones((1, 2, width)))


def test_rms_norm():
    x, scale = np.array([3.0, -4.0]), np.array([0.0, 1.0])
    rms = math.sqrt(12.5 + 1e-6)
    np.testing.assert_allclose(reference.rms_norm(x, scale), [3 / rms, -8 / rms], rtol=1e-15)
    tiny = np.full(4, 1e-3)  # mean square equal to eps
    np.testing.assert_allclose(reference.rms_norm(tiny, np.zeros(4)), math.sqrt(0.5), rtol=1e-15)


def test_elementary_functions_are_stable():
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        x = np.array([-700.0, -30.0, 0.0, 30.0, 1000.0])
        sigmoid, softplus = reference.sigmoid(x), reference.softplus(x)
    np.testing.assert_allclose(sigmoid[:2], np.exp(x[:2]), rtol=1e-12)
    assert sigmoid[2:].tolist() == [0.5, 1 / (1 + math.exp(-30)), 1.0]
    np.testing.assert_allclose(softplus[:2], np.exp(x[:2]), rtol=1e-12)
    np.testing.assert_allclose(softplus[2:], [math.log(2), 30 + math.exp(-30), 1000], rtol=1e-15)


def test_gelu_is_the_tanh_form():
    # The exact (erf) form is 0.8413447460685429 at 1.
    np.testing.assert_allclose(reference.gelu_tanh(np.array([0, 1])), [0, 0.8411919906082768])


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_soft_cap_and_tied_decoder(cap):
    config = make_config(logits_soft_cap=cap)
    table = 10 * np.eye(29, 16)
    x = np.arange(16.0)
    want = np.concatenate([10 * x, np.zeros(13)])
    if cap:
        want = np.tanh(want / 30) * 30
    np.testing.assert_allclose(reference.decode(config, table, x), want, rtol=1e-15)


def test_mlp_gates_with_half_zero():
    w = np.stack([np.full((1, 1), 2.0), np.full((1, 1), 3.0)])
    params = {
        "ffw_up.w": w,
        "ffw_up.b": np.array([0.5, 7.0]).reshape(2, 1, 1, 1),
        "ffw_down.kernel": np.full((1, 1), 10.0),
        "ffw_down.bias": np.ones(1),
    }
    want = reference.gelu_tanh(np.array([[2.5]])) * 10.0 * 10 + 1
    np.testing.assert_allclose(reference.mlp_block(params, np.ones((1, 1))), want, rtol=1e-15)


def test_block_diagonal_linear_keeps_blocks_apart():
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(2, 5, 6)), rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 2))
    dense = np.zeros((6, 6))
    for n in range(3):
        dense[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = w[n]
    want = x @ dense + b.reshape(-1)
    np.testing.assert_allclose(reference.block_diagonal_linear(x, w, b), want, rtol=1e-12)


def test_rope_turns_the_first_half_of_each_head():
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 8))
    positions = np.array([[0, 1, 2, 3, 100, 2047, 5000], [0, 5, 6, 7, 8, 9, 10]])
    y = reference.apply_rope(x, positions, Rope(share=0.5))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    # As complex numbers, first half of the half + i second: frequencies 1 and 10000 ** (-1 / 2).
    angle = positions[..., None, None] * np.array([1.0, 0.01])
    want = (x[..., :2] + 1j * x[..., 2:4]) * np.exp(1j * angle)
    np.testing.assert_allclose(y[..., :2] + 1j * y[..., 2:4], want, rtol=1e-12)


def test_local_attention_scales_queries_and_shares_the_key_head():
    q = np.array([[[4.0, 0, 0, 0], [0, 2.0, 0, 0]]])
    k = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [9.0, 9.0, 9.0, 9.0]])[:, None]
    v = np.array([[1.0] * 4, [0.0] * 4, [99.0] * 4])[:, None]
    y = reference.attend(q, k, v, np.array([[True, True, False]]), scale=0.5)
    want = reference.sigmoid(np.array([2.0, -1.0]))  # of q @ (k[0] - k[1]) / sqrt(4)
    np.testing.assert_allclose(y[0], np.tile(want[:, None], 4), rtol=1e-12)


def test_conv_1d_taps_run_from_the_oldest_to_the_current_input():
    w, b = np.array([[1.0], [10.0], [100.0], [1000.0]]), np.array([0.5])
    x = np.array([[0.0], [1.0], [0], [0], [0], [0]])
    y, state = reference.conv_1d(x, w, b, np.arange(3, 9), np.array([[2.0], [0], [0]]))
    assert y[:, 0].tolist() == [2.5, 1000.5, 100.5, 10.5, 1.5, 0.5]
    assert state[:, 0].tolist() == [0, 0, 0]


def test_linear_scan():
    rng = np.random.default_rng(0)
    x, a, h0 = rng.normal(size=(2, 4, 3)), rng.random((2, 4, 3)), rng.normal(size=(2, 3))
    reset = np.array([[False, True, False, False], [False] * 4])
    y, last = reference.linear_scan(x, a, h0, reset)
    np.testing.assert_array_equal(last, y[:, -1])
    np.testing.assert_array_equal(y[0, 1], x[0, 1])
    np.testing.assert_allclose(y[:, 0], a[:, 0] * h0 + x[:, 0], rtol=1e-12)
    want = x[:, 3] + a[:, 3] * (x[:, 2] + a[:, 2] * y[:, 1])
    np.testing.assert_allclose(last, want, rtol=1e-12)
    flipped, first = reference.linear_scan(x[:, ::-1], a[:, ::-1], h0, reset[:, ::-1], reverse=True)
    np.testing.assert_array_equal(flipped[:, ::-1], y)
    np.testing.assert_array_equal(first, last)
    empty, kept = reference.linear_scan(x[:, :0], a[:, :0], h0)
    assert empty.shape == (2, 0, 3)
    np.testing.assert_array_equal(kept, h0)


def rg_lru_params(a_param: float) -> dict[str, np.ndarray]:
    """One channel, both gates at sigmoid(0) = 1 / 2."""
    w, b = np.zeros((1, 1, 1)), np.zeros((1, 1))
    return {
        "a_param": np.array([a_param]),
        "input_gate.w": w,
        "input_gate.b": b,
        "a_gate.w": w,
        "a_gate.b": b,
    }


def test_rg_lru_constants():
    # log a = -8 * 1/2 * log 2, so a = 1/16.
    x, h0 = np.ones((2, 1)), np.array([3.0])
    y, h = reference.rg_lru(rg_lru_params(0.0), x, np.array([4, 5]), h0)
    added = math.sqrt(1 - 1 / 256) / 2
    want = [3 / 16 + added, (3 / 16 + added) / 16 + added]
    np.testing.assert_allclose(y[:, 0], want, rtol=1e-14)
    np.testing.assert_array_equal(h, y[-1])


def test_rg_lru_multiplier_is_one_where_a_document_starts():
    x, h0 = np.full((3, 1), 2.0), np.array([3.0])
    y, _ = reference.rg_lru(rg_lru_params(0.0), x, np.array([0, 1, 0]), h0)
    np.testing.assert_allclose(y[:, 0], [1, 1 / 16 + math.sqrt(1 - 1 / 256), 1], rtol=1e-14)


def test_rg_lru_multiplier_is_exact_near_a_of_one():
    y, _ = reference.rg_lru(rg_lru_params(-40.0), np.ones((1, 1)), np.array([1]), np.zeros(1))
    # 1 - a^2 = 8 exp(-40) to first order; computed from a itself it would be 0.
    np.testing.assert_allclose(y, math.sqrt(8 * math.exp(-40)) / 2, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "bfloat16"])
def test_everything_is_float64_whatever_the_parameters_are(dtype):
    if dtype == "bfloat16":
        dtype = ml_dtypes.bfloat16
    config = make_config()
    stored = {path: value.astype(dtype) for path, value in make_params(config).items()}
    widened = {path: value.astype(np.float64) for path, value in stored.items()}
    tokens, segment_pos = make_tokens(config, 1, 9), np.arange(9)[None]
    logits, state = reference.forward(config, stored, tokens, segment_pos)
    want, want_state = reference.forward(config, widened, tokens, segment_pos)
    assert logits.dtype == np.float64
    np.testing.assert_array_equal(logits, want)
    assert_same(leaves(state), leaves(want_state), atol=0)
    assert {str(leaf.dtype) for leaf in leaves(state).values()} == {"float64", "int32"}


def test_over_rows_runs_one_module_on_a_padded_batch():
    config = make_config("R")
    params = reference.subtree(make_params(config), "blocks.0.recurrent_block")
    x = np.random.default_rng(0).normal(size=(2, 5, config.width))
    segment_pos = np.array([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 0]])
    state = reference.init_state(config, 2)["blocks.0"]
    mixer: Any = config.model.layers[0].mixer
    block = functools.partial(reference.recurrent_block, mixer, params)
    y, new_state = reference.over_rows(block, x, segment_pos, state)
    row = {name: leaf[1] for name, leaf in state.items()}
    want, want_state = block(x[1, 2:], segment_pos[1, 2:], row)
    assert not y[1, :2].any()
    np.testing.assert_array_equal(y[1, 2:], want)
    assert_same({name: leaf[1] for name, leaf in new_state.items()}, want_state, atol=0)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("segment_pos", "message"),
    [
        ([[0, 2]], "expected 1 or 0 after 0, got 2 at row 0, step 1"),
        ([[0, 1], [3, -1]], "expected 4 or 0 after 3, got -1 at row 1, step 1"),
        ([[5, 5]], "expected 6 or 0 after 5, got 5"),
        ([[-2, 0]], r"expected -1 \(padding\) or a position after -1, got -2 at row 0, step 0"),
        ([0, 1], r"shape \[batch, time\].* got int64 of shape \(2,\)"),
        ([[0.0, 1.0]], "integers .* got float64"),
    ],
)
def test_bad_positions(segment_pos, message):
    with pytest.raises(ValueError, match=message):
        reference.validate_positions(np.array(segment_pos))


@pytest.mark.parametrize(
    "segment_pos", [[[0, 1, 0, 0, 1]], [[-1, -1, 7, 8, 0]], [[-1, -1]], [[3, 4]], [[]]]
)
def test_good_positions(segment_pos):
    reference.validate_positions(np.array(segment_pos, np.int32))


def test_bad_inputs():
    config = make_config()
    with pytest.raises(ValueError, match=r"same shape, got \(1, 2\) and \(1, 3\)"):
        forward(config, [[1, 2]], [[0, 1, 2]])
    with pytest.raises(ValueError, match=r"tokens must be in 0 \.\.\. 28, got -1 \.\.\. 29"):
        forward(config, [[29, -1]], [[0, 1]])
    params = dict(make_params(config))
    del params["final_norm.scale"]
    with pytest.raises(ValueError, match=r"missing final_norm\.scale"):
        reference.forward(config, params, np.zeros((1, 1), int), np.zeros((1, 1), int))
