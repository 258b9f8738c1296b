"""How an engine reads texts: in chunks, into a state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from recurrentgemma.common.errors import NonFiniteLogitsError
from recurrentgemma.common.generation.chunks import chunk_lengths
from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.model.state import State, StateError
from recurrentgemma.common.padding import pad_left

PAD = 0  # any token of the vocabulary: its position, -1, says that it is padding


def read(engine: Engine, state: State, steps: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    """Reads all pending tokens but the last.

    Args:
      engine: What reads them.
      state: Where the texts stand; it stays as it is.
      steps: How many tokens will follow, for which the cache must have room.

    Returns:
      The cache, the last pending tokens, and their positions, [B].
    """
    rows = [tokens[:-1] for tokens in state.pending]
    lengths = chunk_lengths(max(map(len, rows)), engine.prefill_chunks, pad=engine.pads_chunks)
    tokens, segment_pos = pad_left(rows, PAD, sum(lengths), starts=state.lengths)
    capacity = engine.capacity_for(max(state.num_tokens) + steps)
    if engine.prepares:
        engine.prepare(state.num_rows, capacity)
    if state.cache is None:
        cache = engine.begin(state.num_rows, capacity)
    else:
        cache = engine.grow(engine.snapshot(state.cache), capacity)
    start = 0
    for length in lengths:
        chunk = slice(start, start + length)
        cache = engine.prefill(cache, tokens[:, chunk], segment_pos[:, chunk])
        start += length
    last = np.array([row[-1] for row in state.pending], np.int32)
    return cache, last, np.array(state.num_tokens, np.int32) - 1


def nonfinite_logits(engine: Engine, state: State, row: int) -> NonFiniteLogitsError:
    """The error for logits after a row's tokens, with the part of the model where it begins."""
    tokens = state.pending[row]
    cache = engine.begin(1, engine.capacity_for(state.num_tokens[row]))
    if state.cache is not None:
        rows = engine.take(state.cache, np.array([row]))
        cache = engine.grow(rows, engine.capacity_for(state.num_tokens[row]))
    found, start = None, 0
    for length in chunk_lengths(len(tokens), engine.score_chunks, pad=False):
        chunk = np.array([tokens[start : start + length]], np.int32)
        places = state.lengths[row] + np.arange(start, start + length, dtype=np.int32)[None]
        finite, cache = engine.watch(cache, chunk, places)
        found = next((name for name, is_finite in finite.items() if not is_finite), None)
        if found is not None:
            break
        start += length
    where = "the logits" if found in (None, "logits") else found
    advice = (
        "float16 ends at 65504: load the model in bfloat16 or float32"
        if engine.dtype == "float16"
        else f"its weights or the state may hold them already; the model computes in {engine.dtype}"
    )
    return NonFiniteLogitsError(
        f"no token can be chosen for row {row}: NaN or infinity begins in {where}, by token "
        f"{state.lengths[row] + min(start, len(tokens) - 1)}; {advice}"
    )


def require_own(engine: Engine, state: Any) -> State:
    """Raises `StateError` unless the engine can continue the state, which it returns."""
    if not isinstance(state, State):
        raise StateError(f"a State is expected, got {type(state).__name__}")
    differences = [
        f"{name}={its}, the model's is {own}"
        for name, (its, own) in state.config.differences(engine.config).items()
    ]
    if differences:
        raise StateError(f"this is the state of another model: {'; '.join(differences)}")
    if not state.pending or not all(state.pending):
        raise StateError("this is the state of nothing: prefill makes one of a text")
    if state.cache is not None and not engine.owns(state.cache):
        raise StateError(
            "this is the state of another framework's sampler: to move it, write it there with "
            "save_state and read it here with load_state"
        )
    return state


def read_pending(engine: Engine, state: State) -> State:
    """The state with all but the last of its pending tokens read."""
    cache, last, lengths = read(engine, state)
    pending = tuple((token,) for token in last.tolist())
    return State(state.config, cache, tuple(lengths.tolist()), pending, state.seen)


def repeated(engine: Engine, state: State, samples: int) -> State:
    """The state with each row several times, read once."""
    if samples == 1:
        return state
    state = read_pending(engine, state)
    rows = np.repeat(np.arange(state.num_rows), samples)
    return State(
        state.config,
        engine.take(state.cache, rows),
        tuple(state.lengths[row] for row in rows),
        tuple(state.pending[row] for row in rows),
        state.seen[rows],
    )


def scored(
    engine: Engine, tokens: list[int], return_logits: bool = False
) -> Iterator[tuple[Any, np.ndarray]]:
    """For all tokens but the first, by chunk: logits [T, V] or None, log-probabilities [T].

    Padding is cut off here and not on the device, where each length would be compiled.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    lengths = chunk_lengths(len(inputs), engine.score_chunks, pad=engine.pads_chunks)
    padded, segment_pos = pad_left([inputs], PAD, sum(lengths))
    goals, _ = pad_left([targets], PAD, sum(lengths))
    cache = engine.begin(1, engine.capacity_for(len(inputs)))
    start, padding = 0, sum(lengths) - len(inputs)
    for length in lengths:
        chunk = slice(start, start + length)
        logits, logprobs, cache = engine.score(
            cache, padded[:, chunk], segment_pos[:, chunk], goals[:, chunk]
        )
        new = slice(max(padding - start, 0), None)
        scores = engine.on_host(logits)[0, new] if return_logits else None
        yield scores, engine.on_host(logprobs)[0, new]
        start += length
