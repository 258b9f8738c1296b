"""Cuts examples into rows of one length: a long one into windows, short ones side by side.

An example of N tokens takes N - 1 places of a row, since its last token is only a target. So no
place predicts across the end of a document.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.data import DataError, Example

_OPEN_ROWS = 64  # rows that may still take a document


class TooLong(enum.StrEnum):
    """What to do with an example that is longer than a row."""

    SPLIT = "split"
    TRUNCATE = "truncate"
    SKIP = "skip"


class Cut(NamedTuple):
    """Examples that each fit into a row.

    Attributes:
      examples: The examples; each has something to predict.
      too_long: How many examples were longer than a row.
      empty: How many examples or windows had nothing to predict, and were left out.
    """

    examples: list[Example]
    too_long: int
    empty: int


def cut(
    examples: Sequence[Example],
    length: int,
    too_long: TooLong = TooLong.SPLIT,
    stride: int | None = None,
) -> Cut:
    """Cuts examples to rows of `length` places.

    Args:
      examples: Examples of any length.
      length: Places in a row.
      too_long: Whether a longer example is left out, cut at the row's end, or split into windows.
        One window predicts each token; tokens that a window repeats are context.
      stride: Places from the start of one window to the start of the next, at most `length`;
        `length` if None.

    Raises:
      ValueError: The length or the stride is out of range.
      DataError: No example is left.
    """
    stride = length if stride is None else stride
    if length < 1 or not 1 <= stride <= length:
        raise UserError(
            f"length must be at least 1, and stride from 1 to length, got {length=} {stride=}"
        )
    long = sum(example.places > length for example in examples)
    pieces: list[Example] = []
    for example in examples:
        if example.places <= length:
            pieces.append(example)
        elif too_long is TooLong.TRUNCATE:
            pieces.append(
                example._replace(
                    tokens=example.tokens[: length + 1], counts=example.counts[: length + 1]
                )
            )
        elif too_long is TooLong.SPLIT:
            pieces += _windows(example, length, stride)
    kept = [piece for piece in pieces if piece.counts[1:].any()]
    if not kept:
        raise DataError(f"no example has anything to predict within {length} tokens")
    return Cut(kept, long, len(pieces) - len(kept))


def _windows(example: Example, length: int, stride: int) -> list[Example]:
    windows = []
    for start in range(0, example.places - length + stride, stride):
        tokens, counts = (z[start : start + length + 1] for z in (example.tokens, example.counts))
        if start:
            counts = counts.copy()
            counts[: length - stride + 1] = False
        windows.append(example._replace(tokens=tokens, counts=counts))
    return windows


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Packs documents of these sizes, first-fit, into rows of `length` places; returns the rows."""
    rows: list[list[int]] = []
    free: dict[int, int] = {}  # places left in each open row, the oldest row first
    for document, size in enumerate(sizes):
        row = next((row for row, places in free.items() if places >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free[row] = length
            if len(free) > _OPEN_ROWS:
                del free[next(iter(free))]
        rows[row].append(document)
        free[row] -= size
        if not free[row]:
            del free[row]
    return rows


def fill(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """A batch of rows of examples, each row padded on the left to `length` places."""
    shape = (len(rows), length)
    batch = Batch(
        np.full(shape, pad_id, np.int32),
        np.full(shape, -1, np.int32),
        np.full(shape, pad_id, np.int32),
        np.zeros(shape, np.float32),
    )
    for row, examples in enumerate(rows):
        start = length - sum(example.places for example in examples)
        for tokens, counts, _ in examples:
            end = start + len(tokens) - 1
            batch.tokens[row, start:end] = tokens[:-1]
            batch.segment_pos[row, start:end] = np.arange(end - start)
            batch.targets[row, start:end] = tokens[1:]
            batch.weights[row, start:end] = counts[1:]
            start = end
    return batch


class Position(NamedTuple):
    """A place in an endless stream of rows: the pass over the examples, and the row in it."""

    epoch: int
    row: int


class RowStream:
    """Rows without end: each epoch shuffles all examples again.

    Attributes:
      position: The place of the next row; set it to continue from another place.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        pad_id: int,
        *,
        seed: int = 0,
        packed: bool = True,
    ) -> None:
        """Begins at the first row.

        Args:
          examples: Examples that fit into a row; see `cut`.
          length: Places in a row.
          pad_id: The token id of padding.
          seed: The seed of the order.
          packed: Whether several examples may share a row.
        """
        self._examples = examples
        self._length, self._pad_id, self._seed, self._packed = length, pad_id, seed, packed
        self.position = Position(0, 0)

    @property
    def position(self) -> Position:
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        self._position = Position(*position)
        self._rows = self._plan(position.epoch)

    def rows_in_epoch(self) -> int:
        """How many rows the current epoch has; another may have a few more or fewer."""
        return len(self._rows)

    def take(self, rows: int) -> Batch:
        """The next rows."""
        taken = []
        for _ in range(rows):
            epoch, row = self._position
            if row == len(self._rows):
                epoch, row = epoch + 1, 0
                self.position = Position(epoch, row)
            taken.append([self._examples[i] for i in self._rows[row]])
            self._position = Position(epoch, row + 1)
        return fill(taken, self._length, self._pad_id)

    def _plan(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._examples))
        if not self._packed:
            return [[int(i)] for i in order]
        rows = pack([self._examples[i].places for i in order], self._length)
        return [[int(order[i]) for i in row] for row in rows]


def in_order(
    examples: Sequence[Example], length: int, pad_id: int, rows: int, *, packed: bool = True
) -> list[Batch]:
    """All examples once, in batches of one size; rows that fill up the last one have weight 0."""
    plan = pack([example.places for example in examples], length) if packed else None
    documents = [[i] for i in range(len(examples))] if plan is None else plan
    batches = []
    for first in range(0, len(documents), rows):
        chosen = [[examples[i] for i in row] for row in documents[first : first + rows]]
        batch = fill([*chosen, *[chosen[-1]] * (rows - len(chosen))], length, pad_id)
        batch.weights[len(chosen) :] = 0
        batches.append(batch)
    return batches
