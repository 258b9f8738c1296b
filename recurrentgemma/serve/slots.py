"""The running batch: rows enter at free slots, grow together and leave by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.generation.loop import on_host
from recurrentgemma.common.generation.prefill import PAD, nonfinite_logits
from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.settings import Variant, row_settings, variant_of
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Greedy, uniform
from recurrentgemma.common.model.state import empty_state
from recurrentgemma.serve.jobs import Failed, NewToken, SlotRow, one_place

MOST_LOGPROBS, MOST_STOPS, MOST_BIASES = 20, 64, 300
_EMPTY = RowRequest(0, Greedy(), Stops({}, ()))


def batch_sizes(num_slots: int) -> tuple[int, ...]:
    """The sizes of a batch that grows with its rows: 1, 8, 64, ... and all slots."""
    sizes = [1]
    while sizes[-1] * 8 < num_slots:
        sizes.append(sizes[-1] * 8)
    return tuple(dict.fromkeys([*sizes, num_slots]))


def _variants(vocab_size: int) -> list[Variant]:
    """The variants that steps have: from greedy rows to ones that report log-probabilities."""
    widths = dict.fromkeys(min(width, vocab_size) for width in (0, 64, vocab_size))
    drawn = [Variant(True, width) for width in widths]
    everything = Variant(True, vocab_size, True, min(MOST_LOGPROBS, vocab_size))
    return [Variant(), *drawn, everything]


def served_variant(rows: Sequence[SlotRow], vocab_size: int) -> Variant:
    """The least of a few variants that has what the rows need, so that few programs compile."""
    needed = variant_of([row.asked for row in rows], vocab_size, None, False)
    *variants, everything = _variants(vocab_size)
    if needed.penalised or any(row.job.num_logprobs is not None for row in rows):
        return everything
    drawn = needed.plain or bool(needed.width)
    return next(v for v in variants if v.plain == drawn and v.width >= needed.width)


class Slots:
    """The rows of a running batch.

    A step has as many rows as the least of `sizes` that all rows fit in. With one size, no bit of
    a row's logits depends on its neighbours.

    Attributes:
      engine: What decodes.
      rows: The row in each slot; None in a free one.
    """

    def __init__(self, engine: Engine, sizes: Sequence[int], capacity: int | None) -> None:
        self.engine, self.sizes, self._capacity = engine, tuple(sizes), capacity
        engine.reproducible = len(self.sizes) == 1
        self.rows: list[SlotRow | None] = [None] * self.sizes[0]
        self._caches: dict[int, Any] = {}
        self._arranged = False
        self._settings: Any = None
        self._seen: Any = None
        self._variant = Variant()

    @property
    def active(self) -> list[SlotRow]:
        """The rows in slots."""
        return [row for row in self.rows if row is not None]

    @property
    def free(self) -> int:
        """How many rows may enter."""
        return self.sizes[-1] - len(self.active)

    def prepare(self) -> None:
        """Runs each program that a row may need once, so that it is compiled."""
        engine, vocab_size, none = self.engine, self.engine.config.vocab_size, np.array([0])
        for size in self.sizes:
            settings = self._row_settings([_EMPTY] * size)
            cache = engine.begin(size, self._capacity)
            cache = engine.put(cache, none, engine.take(cache, none))
            idle = np.full(size, -1, np.int32)
            numbers = uniform([None] * size, idle + 1, engine.burst)
            for variant in _variants(vocab_size):
                seen = None
                if variant.penalised:
                    seen = engine.on_device(np.zeros((size, vocab_size), np.int32))
                zeros = np.zeros(size, np.int32)
                _, cache, _ = engine.decode(
                    variant, settings, cache, seen, zeros, idle, zeros, numbers
                )
            self._caches[size] = cache

    def enter(self, row: SlotRow) -> None:
        """Puts a waiting row into a free slot."""
        self._resize(len(self.active) + 1)
        self._place(self.rows.index(None), row, row.state)
        row.state = None

    def leave(self, row: SlotRow, keep: bool = False) -> Any:
        """Frees the slot of a row; returns the row's state if it is to be kept."""
        slot = self.rows.index(row)
        self._arranged = False
        self.rows[slot] = None
        return self._taken(slot) if keep else None

    def step(self) -> list[tuple[SlotRow, NewToken | Failed]]:
        """Grows all rows; those that ended have left. Returns what became of them."""
        if not self._arranged:
            self._arrange()
        engine, size = self.engine, len(self.rows)
        tokens, position = np.full(size, PAD, np.int32), np.full(size, -1, np.int32)
        left = np.zeros(size, np.int32)
        for slot, row in enumerate(self.rows):
            if row is not None:
                tokens[slot], position[slot], left[slot] = row.last, row.num_read, row.left
        keys = [row and row.asked.key for row in self.rows]
        sampled, self._caches[size], self._seen = engine.decode(
            self._variant,
            self._settings,
            self._caches[size],
            self._seen,
            tokens,
            position,
            left,
            uniform(keys, position + 1, engine.burst),
        )
        new_tokens, logprobs = on_host(engine, sampled)
        events: list[tuple[SlotRow, NewToken | Failed]] = []
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            for place in range(engine.burst):
                row.num_read += 1
                token, count = int(new_tokens[place, slot]), row.job.num_logprobs
                if token < 0:
                    events.append((row, Failed(self._nonfinite(row))))
                    row.left = 0
                    break
                reported = None if count is None else one_place(logprobs, (place, slot), count)
                events.append((row, row.add(token, reported)))
                if not row.left:
                    # The engine knows ids and lengths; behind a stop string it read on.
                    by_string = row.text.finish_reason == "stop_string"
                    row.exact = not by_string or place + 1 == engine.burst
                    break
        return events

    def _nonfinite(self, row: SlotRow) -> Exception:
        state = empty_state(self.engine.config, 1).extended([row.tokens])
        return nonfinite_logits(self.engine, state, 0)

    def shrink(self) -> None:
        """Goes on with as few slots as the rows need."""
        if self.active:
            self._resize(len(self.active))

    def _resize(self, count: int) -> None:
        size = next(size for size in self.sizes if size >= count)
        if size != len(self.rows):
            moved = [(row, self._taken(slot)) for slot, row in enumerate(self.rows) if row]
            self.rows = [None] * size
            for slot, (row, state) in enumerate(moved):
                self._place(slot, row, state)

    def _place(self, slot: int, row: SlotRow, state: Any) -> None:
        size = len(self.rows)
        if size not in self._caches:
            self._caches[size] = self.engine.begin(size, self._capacity)
        self.rows[slot] = row
        self._caches[size] = self.engine.put(self._caches[size], np.array([slot]), state)
        self._arranged = False

    def _taken(self, slot: int) -> Any:
        return self.engine.take(self._caches[len(self.rows)], np.array([slot]))

    def _arrange(self) -> None:
        """What a step needs to know of the rows, on the device."""
        engine, vocab_size = self.engine, self.engine.config.vocab_size
        asked = [_EMPTY if row is None else row.asked for row in self.rows]
        self._settings = self._row_settings(asked)
        self._variant = served_variant(self.active, vocab_size)
        self._seen = None
        if self._variant.penalised:
            seen = np.zeros((len(self.rows), vocab_size), np.int32)
            for slot, row in enumerate(self.rows):
                if row is not None:
                    seen[slot, [*row.job.tokens]] = 1
                    np.add.at(seen[slot], row.generated, 2)
            self._seen = engine.on_device(seen)
        self._arranged = True

    def _row_settings(self, asked: Sequence[RowRequest]) -> Any:
        """The settings on the device, always of the same shapes."""
        settings = row_settings(asked, self.engine.config.vocab_size, MOST_STOPS, MOST_BIASES)
        return self.engine.on_device(settings)
