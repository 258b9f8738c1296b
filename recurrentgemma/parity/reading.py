"""A model's outputs on a batch: in one pass, in chunks, token by token, and in free decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.parity.batches import ParityBatch
from recurrentgemma.parity.models import Arrays, ComparedModel

CASES = ("one pass", "in chunks", "step by step")


class Reading(NamedTuple):
    """Everything that is compared about a model in one dtype.

    Attributes:
      tensors: For each of `CASES`, the activations, the logits and the state after them, by name.
        Padding is left out, so that activations are [N, ...].
      gradients: The gradients by parameter; empty if they were not asked for.
      greedy: The most likely tokens after the batch, [B, S].
    """

    tensors: dict[str, Arrays]
    gradients: Arrays
    greedy: np.ndarray


def read(
    model: ComparedModel,
    batch: ParityBatch,
    names: tuple[str, ...],
    num_greedy: int,
    gradients: bool,
    capacity: int,
) -> Reading:
    """Runs a model on a batch.

    Args:
      model: The model.
      batch: The batch.
      names: The names of the activations.
      num_greedy: How many tokens to continue each row with.
      gradients: Whether to compute gradients.
      capacity: Tokens that a state which grows with the text has room for.
    """

    def run(tokens: np.ndarray, segment_pos: np.ndarray, state: Any) -> tuple[Arrays, Any]:
        outputs, state = model.run(tokens, segment_pos, state, names)
        return {name: _rows_first(a, tokens.shape) for name, a in outputs.items()}, state

    tokens, segment_pos = batch.tokens, batch.segment_pos
    whole, state = run(tokens, segment_pos, None)
    places = segment_pos >= 0
    tensors = {CASES[0]: _at(whole, places) | ({} if state is None else model.arrays_of(state))}
    state, parts = model.start(len(tokens), capacity), []
    after_chunks: Arrays = {}
    for part in batch.parts():
        if part[0].shape[1] == 1 and not after_chunks:
            after_chunks = model.arrays_of(state)
        outputs, state = run(*part, state)
        parts.append(outputs)
    read_at_once = len(parts) - batch.num_steps
    cut = sum(batch.chunks[:read_at_once])
    for case, some, mask, after in (
        (CASES[1], parts[:read_at_once], places[:, :cut], after_chunks),
        (CASES[2], parts[read_at_once:], places[:, cut:], model.arrays_of(state)),
    ):
        joined = {name: np.concatenate([part[name] for part in some], 1) for name in some[0]}
        tensors[case] = _at(joined, mask) | after
    greedy, place, logits = [], segment_pos[:, -1:], parts[-1]["logits"]
    for _ in range(num_greedy):
        greedy.append(np.argmax(logits[:, -1:], -1).astype(np.int32))
        place = place + 1
        outputs, state = run(greedy[-1], place, state)
        logits = outputs["logits"]
    return Reading(
        tensors,
        model.gradients(tokens, segment_pos) if gradients else {},
        np.concatenate(greedy, 1) if greedy else np.zeros((len(tokens), 0), np.int32),
    )


def _rows_first(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An activation as [B, T, ...]; a stack of matrices returns [C, B, T, ...]."""
    return array if array.shape[:2] == shape else np.moveaxis(array, 0, 2)


def _at(arrays: Arrays, mask: np.ndarray) -> Arrays:
    return {name: array[mask] for name, array in arrays.items()}
