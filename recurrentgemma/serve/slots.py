"""The running batch: rows enter at free slots, grow together and leave by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.generation.loop import on_host
from recurrentgemma.common.generation.prefill import nonfinite_logits
from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.settings import Variant, row_settings, variant_of
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Greedy, Sampling, uniform
from recurrentgemma.common.model.state import empty_state
from recurrentgemma.serve.jobs import SlotRow, one_place
from recurrentgemma.serve.rows import Held, moved, moves

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
    all_ = [Variant(True, width, True, _most_logprobs(vocab_size)) for width in (0, vocab_size)]
    return [Variant(), *drawn, *all_]


def _most_logprobs(vocab_size: int) -> int:
    return min(MOST_LOGPROBS, vocab_size)


def served_variant(rows: Sequence[SlotRow], vocab_size: int, exact: bool) -> Variant:
    """What a step needs for these rows.

    Args:
      rows: The rows.
      vocab_size: Number of tokens.
      exact: Whether any variant will do; else it is the least of a few that has what the rows
        need, so that few programs compile.
    """
    reports = any(row.job.num_logprobs is not None for row in rows)
    count = _most_logprobs(vocab_size) if reports else None
    needed = variant_of([row.asked for row in rows], vocab_size, count, False)
    if exact:
        return needed
    more = needed.penalised or reports
    drawn = needed.plain or bool(needed.width) or more
    return next(
        v
        for v in _variants(vocab_size)
        if v.penalised == more and v.plain == drawn and v.width >= needed.width
    )


class Slots:
    """The rows of a running batch.

    A step has as many rows as the least of `sizes` that all rows fit in. With one size, no bit of
    a row's logits depends on its neighbours.

    Attributes:
      engine: What decodes.
      rows: The row in each slot; None in a free one.
      bursts: How many steps are one dispatch at most, for each size.
    """

    def __init__(
        self, engine: Engine, sizes: Sequence[int], capacity: int | None, bursts: bool = False
    ) -> None:
        """Prepares an empty batch.

        Args:
          engine: What decodes.
          sizes: How many rows a step may have.
          capacity: Tokens that a state which grows with the text has room for.
          bursts: Whether `step` may be asked for the engine's long bursts.
        """
        self.engine, self.sizes, self._capacity = engine, tuple(sizes), capacity
        engine.reproducible = len(self.sizes) == 1
        # More rows take longer, and their dispatch costs less beside that.
        most = engine.long_burst if bursts else 1
        self.bursts = {size: max(engine.burst, most >> n) for n, size in enumerate(self.sizes)}
        self.rows: list[SlotRow | None] = [None] * self.sizes[0]
        self._caches: dict[int, Any] = {}
        self._settings: Any = None
        self._choices: list[tuple[Sampling, Stops]] = []  # what the settings say
        self._seen: Any = None
        self._variant: Variant | None = None  # None where the rows have changed

    @property
    def active(self) -> list[SlotRow]:
        """The rows in slots."""
        return [row for row in self.rows if row is not None]

    @property
    def free(self) -> int:
        """How many rows may enter."""
        return self.sizes[-1] - len(self.active)

    def prepare(self, entering: Sequence[int] = (1,)) -> None:
        """Runs each program that a row may need once, so that it is compiled.

        Args:
          entering: How many rows the caches have from which rows enter.
        """
        engine, vocab_size = self.engine, self.engine.config.vocab_size
        for size in self.sizes:
            settings = self._row_settings([_EMPTY] * size)
            cache, idle = engine.begin(size, self._capacity), np.full(size, -1, np.int32)
            for variant in _variants(vocab_size) if engine.pads_chunks else [Variant()]:
                for burst in {engine.burst, self._burst(variant, size)}:
                    seen = None
                    if variant.penalised:
                        seen = engine.on_device(np.zeros((size, vocab_size), np.int32))
                    zeros, draws = np.zeros(size, np.int32), np.ones((burst, size), np.float32)
                    _, cache, _ = engine.decode(
                        variant, settings, cache, seen, zeros, idle, zeros, draws
                    )
            for rows in entering:
                cache = moves(engine, cache, engine.begin(rows, self._capacity))
            self._caches[size] = cache
            for other in self.sizes[: self.sizes.index(size)]:
                for into, out in ((size, other), (other, size)):
                    self._caches[into] = moves(engine, self._caches[into], self._caches[out])

    def enter(self, rows: Sequence[SlotRow]) -> None:
        """Puts waiting rows into free slots."""
        self._resize(len(self.active) + len(rows))
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        groups: dict[int, list[tuple[int, Held]]] = {}
        for slot, row in zip(free, rows, strict=False):
            self.rows[slot] = row
            groups.setdefault(id(row.state.cache), []).append((slot, row.state))
            row.state = None
        for group in groups.values():
            slots, held = zip(*group, strict=True)
            self._place(slots, held[0].cache, [state.row for state in held])

    def leave(self, row: SlotRow, keep: bool = False) -> Any:
        """Frees the slot of a row; returns the row's state if it is to be kept."""
        slot = self.rows.index(row)
        self._variant = None
        self.rows[slot] = None
        return Held(self._caches[len(self.rows)], slot).copied(self.engine) if keep else None

    @property
    def burst(self) -> int:
        """How many steps the rows can make in one dispatch, beyond the end of some of them."""
        most = self._burst(self._arranged(), len(self.rows))
        begun = all(row.generated for row in self.active)  # a first token comes as soon as it can
        enough = 4 * max(row.left for row in self.active) >= 3 * most  # steps past the end are few
        return most if begun and enough else self.engine.burst

    def _burst(self, variant: Variant, size: int) -> int:
        return self.engine.burst if variant.penalised else self.bursts[size]

    def step(self, burst: int | None = None) -> list[tuple[SlotRow, Exception]]:
        """Grows all rows; those that end have no tokens left. Returns those that failed, with why.

        Args:
          burst: Tokens of each row: `burst`, or the engine's own number if None.
        """
        engine, size, burst = self.engine, len(self.rows), burst or self.engine.burst
        variant = self._arranged()
        # A free slot grows as the first row does: a step without padding takes fewer operations.
        grown = [row or self.active[0] for row in self.rows]
        tokens = np.array([row.last for row in grown], np.int32)
        position = np.array([row.num_read for row in grown], np.int32)
        left = np.array([row.left for row in grown], np.int32)
        keys = [row and row.asked.key for row in self.rows]
        sampled, self._caches[size], self._seen = engine.decode(
            variant,
            self._settings,
            self._caches[size],
            self._seen,
            tokens,
            position,
            left,
            uniform(keys, position + 1, burst),
        )
        new_tokens, logprobs = on_host(engine, sampled)
        failed: list[tuple[SlotRow, Exception]] = []
        for slot, (row, column) in enumerate(zip(self.rows, new_tokens.T.tolist(), strict=True)):
            if row is None:
                continue
            count = row.job.num_logprobs
            for place, token in enumerate(column):
                row.num_read += 1
                if token < 0:
                    failed.append((row, self._nonfinite(row)))
                    break
                reported = None if count is None else one_place(logprobs, (place, slot), count)
                row.add(token, reported)
                if not row.left:
                    # The engine knows ids and lengths; behind a stop string it read on.
                    by_string = row.text.finish_reason == "stop_string"
                    row.exact = not by_string or place + 1 == burst
                    break
        return failed

    def _nonfinite(self, row: SlotRow) -> Exception:
        state = empty_state(self.engine.config, 1).extended([row.tokens])
        return nonfinite_logits(self.engine, state, 0)

    def shrink(self) -> None:
        """Goes on with as few slots as the rows need."""
        if self.active:
            self._resize(len(self.active))

    def _resize(self, count: int) -> None:
        size, before = next(size for size in self.sizes if size >= count), len(self.rows)
        if size != before:
            slots = [slot for slot, row in enumerate(self.rows) if row]
            self.rows = [*self.active, *[None] * (size - len(slots))]
            if slots:
                self._place(range(len(slots)), self._caches[before], slots)

    def _place(self, slots: Sequence[int], cache: Any, rows: Sequence[int]) -> None:
        """Puts rows of a cache into these slots."""
        size = len(self.rows)
        if size not in self._caches:
            self._caches[size] = self.engine.begin(size, self._capacity)
        self._caches[size] = moved(self.engine, self._caches[size], slots, cache, rows)
        self._variant = None

    def _arranged(self) -> Variant:
        """What a step needs for the rows; how each row chooses is on the device."""
        if self._variant is not None:
            return self._variant
        engine, vocab_size = self.engine, self.engine.config.vocab_size
        # A free slot chooses as the first row does. Rows that come and go often choose alike.
        asked = [(row or self.active[0]).asked for row in self.rows]
        choices = [(one.sampling, one.stops) for one in asked]
        if choices != self._choices:
            self._settings, self._choices = self._row_settings(asked), choices
        self._variant = served_variant(self.active, vocab_size, exact=not engine.pads_chunks)
        self._seen = None
        if self._variant.penalised:
            seen = np.zeros((len(self.rows), vocab_size), np.int32)
            for slot, row in enumerate(self.rows):
                if row is not None:
                    seen[slot, [*row.job.tokens]] = 1
                    np.add.at(seen[slot], row.generated, 2)
            self._seen = engine.on_device(seen)
        return self._variant

    def _row_settings(self, asked: Sequence[RowRequest]) -> Any:
        """The settings on the device, always of the same shapes."""
        settings = row_settings(asked, self.engine.config.vocab_size, MOST_STOPS, MOST_BIASES)
        return self.engine.on_device(settings)
