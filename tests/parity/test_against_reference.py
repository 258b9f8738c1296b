"""Whole models against `common.reference`: logits and state, however the tokens come."""

import numpy as np
import pytest
from cases import CONFIGS, make_batch, make_config, make_params, make_tokens, positions, scaled_to
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import fewer_in_jax, sweep

from backends import Backend
from recurrentgemma.common.model import reference
from tolerances import assert_close

# Few, since JAX compiles each; below, between and above the windows.
CHUNKS = (1, 6, 11)
FEWER = {"attention_first": (1, 6), "recurrent": (1, 6), "attention": (1, 11)}
# The lengths of each config in JAX.
LENGTHS = {
    "griffin": (1, 7, 8, 9, 63),
    "attention_last": (4, 5, 6),
    "attention_first": (1, 63),
    "recurrent": (1, 7),
    "attention": (3, 4, 5),
}


def check(backend, config, tokens, segment_pos, state=None, dtype="float64", params=None):
    """One call against the reference; returns the reference's state."""
    params = make_params(config) if params is None else params
    expected, expected_state = reference.forward(config, params, tokens, segment_pos, state)
    logits, new_state = backend.griffin(config, params, dtype)(tokens, segment_pos, state)
    real = segment_pos >= 0
    assert logits.shape == expected.shape
    assert_close(logits[real], expected[real], "logits", dtype)
    assert_close(new_state, expected_state, "state", dtype)
    return expected_state


def fixed_lengths() -> list[tuple[str, int]]:
    cases = []
    for name, config in CONFIGS.items():
        window = config.attention_window_size
        cases += [(name, t) for t in sorted({1, 7, 63, window - 1, window, window + 1})]
    return cases


@pytest.mark.parametrize(
    ("backend", "case"),
    fewer_in_jax(fixed_lengths(), [(n, t) for n, lengths in LENGTHS.items() for t in lengths]),
    indirect=["backend"],
)
def test_fixed_lengths(backend: Backend, case: tuple[str, int]) -> None:
    name, length = case
    config = CONFIGS[name]
    check(backend, config, *make_batch(config, length))


@st.composite
def conversations(draw, lengths: tuple[int, ...]) -> tuple[list[int], np.ndarray, int]:
    """Lengths of chunks; positions of three rows, padded anew in each chunk; a seed of tokens."""
    chunks = draw(st.lists(st.sampled_from(lengths), min_size=1, max_size=4))
    rows = []
    for _ in range(3):
        row: list[int] = []
        place = draw(st.sampled_from([0, 0, 0, 9]))  # 9: a document whose start nobody has seen
        for length in chunks:
            padding = draw(st.one_of(st.just(0), st.integers(0, length)))
            starts = draw(st.sets(st.integers(0, length - 1), max_size=2))
            row += [-1] * padding
            for t in range(padding, length):
                place = 0 if t in starts else place
                row.append(place)
                place += 1
        rows.append(row)
    return chunks, np.array(rows, np.int32), draw(st.integers(0, 2**16))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=sweep(8, 100))
@given(data=st.data())
def test_any_split_documents_and_padding(backend: Backend, name: str, data: st.DataObject) -> None:
    config = CONFIGS[name]
    lengths = sweep(FEWER.get(name, CHUNKS), CHUNKS)
    chunks, segment_pos, seed = data.draw(conversations(lengths))
    tokens = make_tokens(config, *segment_pos.shape, seed=seed)
    state = reference.init_state(config, len(tokens))
    ends = np.cumsum(chunks)[:-1]
    for part, place in zip(
        np.split(tokens, ends, axis=1), np.split(segment_pos, ends, axis=1), strict=True
    ):
        state = check(backend, config, part, place, state)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_twins_keep_their_own_state(backend: Backend, checkpointing: bool) -> None:
    """Fed with what they return themselves, over many chunks; the reference takes all at once."""
    config = CONFIGS["griffin"]
    model = backend.griffin(config, make_params(config), gradient_checkpointing=checkpointing)
    segment_pos = np.array([positions([40]), positions([17, 23]), positions([31], 9)], np.int32)
    tokens = make_tokens(config, *segment_pos.shape)
    state, logits = reference.init_state(config, 3), []
    for start, length in [(0, 11), (11, 1), (12, 6), (18, 11), (29, 11)]:
        part = slice(start, start + length)
        out, state = model(tokens[:, part], segment_pos[:, part], state)
        logits.append(out)
    expected, expected_state = reference.forward(config, make_params(config), tokens, segment_pos)
    real = segment_pos >= 0
    assert_close(np.concatenate(logits, 1)[real], expected[real], "logits", "float64")
    assert_close(state, expected_state, "state", "float64")


FLOAT32 = {
    "capped": make_config("RRA", width=48, lru_width=64, logits_soft_cap=30.0),
    "uncapped": make_config("RA", width=40, lru_width=24, logits_soft_cap=0.0),
    "deep": make_config("RRARR", width=64, attention_window_size=16, logits_soft_cap=30.0),
}


@pytest.mark.parametrize("name", sweep(["capped", "uncapped"], [*FLOAT32]))
def test_float32_at_logits_of_30(backend: Backend, name: str) -> None:
    config = FLOAT32[name]
    tokens, segment_pos = make_batch(config, 63)
    magnitude = 60 if config.logits_soft_cap else 30
    params = scaled_to(config, make_params(config), tokens, segment_pos, magnitude)
    expected, _ = reference.forward(config, params, tokens, segment_pos)
    assert 28 < np.abs(expected).max() < 30.001
    state = check(backend, config, tokens, segment_pos, dtype="float32", params=params)
    last = segment_pos[:, -1:]
    for step in range(1, 4):
        more = make_tokens(config, 3, 1, seed=step)
        state = check(backend, config, more, last + step, state, "float32", params)


def test_a_cap_of_zero_is_no_cap(backend: Backend) -> None:
    config = CONFIGS["attention_last"]
    tokens, segment_pos = make_batch(config, 7)
    params = scaled_to(config, make_params(config), tokens, segment_pos, 500)
    check(backend, config, tokens, segment_pos, params=params)
