"""Rows of caches: where a text's state lies, and how rows go from one cache to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.model.state import capacity_of


class Held(NamedTuple):
    """The state of one text: a row of a cache.

    Attributes:
      cache: The cache.
      row: Which of its rows.
      shared: Whether others need the cache, so that no step may use it up.
    """

    cache: Any
    row: int = 0
    shared: bool = False

    def copied(self, engine: Engine) -> Any:
        """A cache of this row alone, which no step changes."""
        return engine.take(self.cache, np.array([self.row]))

    def given_up(self, engine: Engine) -> Any:
        """A cache of this row alone, which a step may use up; nobody reads this one any more."""
        return self.copied(engine) if self.shared or num_rows(self.cache) > 1 else self.cache


def num_rows(cache: Any) -> int:
    """How many rows a cache has."""
    return len(next(iter(cache.values()))[0])


def moved(
    engine: Engine, cache: Any, places: Sequence[int], other: Any, rows: Sequence[int]
) -> Any:  # fmt: skip
    """The cache, which is used up, with rows of another in these places.

    They go one at a time, or as many as the smaller cache has: other numbers are not compiled. A
    state that grows with the text gets the room that the cache has.
    """
    capacity = capacity_of(engine.config, cache)
    width = min(num_rows(cache), num_rows(other))
    for start in range(0, len(rows), width):
        some = np.array([places[start : start + width], rows[start : start + width]])
        if engine.pads_chunks and 1 < some.shape[1] < width:  # the last one several times
            some = np.pad(some, ((0, 0), (0, width - some.shape[1])), mode="edge")
        taken = engine.grow(engine.take(other, some[1]), capacity)
        cache = engine.put(cache, some[0], taken)
    return cache


def moves(engine: Engine, cache: Any, other: Any) -> Any:
    """The cache, which is used up, after each kind of move from another: all are compiled."""
    for count in {1, min(num_rows(cache), num_rows(other))}:
        cache = moved(engine, cache, range(count), other, range(count))
    return cache
