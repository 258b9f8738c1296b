"""Prompts on their way into states, a chunk at a time; short ones are read together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recurrentgemma.common.generation.engine import Engine, LogProbs
from recurrentgemma.common.generation.prefill import PAD
from recurrentgemma.common.model.state import capacity_of
from recurrentgemma.common.padding import pad_left
from recurrentgemma.serve.jobs import Job
from recurrentgemma.serve.rows import Held, moved, moves

_SHORT = 8  # tokens: the least chunk of prompts that are read together


class PromptReading:
    """The state of one row after the tokens of a job's prompt, all but the last.

    Attributes:
      job: Whose prompt it is.
      state: The state so far; None before the first token.
      at: How many tokens it has read.
      marks: Places in the prompt where a chunk ends and the state is worth keeping.
      cached: How many tokens it had read when reading began.
      waited: How many chunks of others were read since the last of its own.
      scored: The log-probabilities of the tokens so far, a part for each chunk.
    """

    def __init__(self, job: Job, cached: int, state: Held | None, grid: int = 1) -> None:
        """Begins after the tokens that a state has read; marks are moved down to a grid.

        A prompt that is scored has no marks: other programs read it, which round differently.
        """
        self.job, self.at, self.cached, self.state = job, cached, cached, state
        self.marks = [] if job.scored else [mark - mark % grid for mark in job.marks]
        self.waited = 0
        self.scored: list[LogProbs] = []

    @property
    def num_left(self) -> int:
        """How many tokens are not read yet."""
        return len(self.job.tokens) - 1 - self.at

    @property
    def part(self) -> int:
        """How many tokens are not read yet before the next mark."""
        marks = [mark for mark in self.marks if self.at < mark < len(self.job.tokens)]
        return min(marks, default=len(self.job.tokens) - 1) - self.at

    @property
    def scores(self) -> LogProbs | None:
        """The log-probabilities of all tokens but the first; None if not asked for."""
        if not self.job.scored:
            return None
        if not self.scored:
            return LogProbs(np.zeros(0), *np.zeros((2, 0, self.job.num_logprobs or 0)))
        return LogProbs(*map(np.concatenate, zip(*self.scored, strict=True)))


class Reader:
    """Reads chunks of prompts.

    Attributes:
      lengths: The lengths of chunks, where lengths are compiled.
      widths: How many prompts a chunk may have; where chunks are not compiled, any number up to the
        last.
    """

    def __init__(
        self, engine: Engine, capacity: int | None, beside: int, num_slots: int, together: bool
    ) -> None:
        """Prepares to read.

        Args:
          engine: What reads.
          capacity: Tokens that a state which grows with the text has room for.
          beside: Tokens of a chunk while texts grow.
          num_slots: How many texts grow at a time.
          together: Whether several prompts are read together.
        """
        self._engine, self._capacity, self._beside = engine, capacity, beside
        self.lengths = (*engine.prefill_chunks, _SHORT) if together else engine.prefill_chunks
        self._few = min(num_slots, max(1, beside // _SHORT))
        most = num_slots
        if engine.pads_chunks:
            # A compiled chunk has all the room that growing states may need: few of these.
            most = min(num_slots, self.lengths[0] // _SHORT) if capacity is None else self._few
        self.widths = tuple(sorted({1, self._few, most})) if together else (1,)
        self._empty: dict[int, Any] = {}

    @property
    def empty(self) -> Any:
        """A cache of one row before the first token, which nothing may use up."""
        if 1 not in self._empty:
            self._empty[1] = self._engine.begin(1, self._capacity)
        return self._empty[1]

    def prepare(self) -> None:
        """Runs or compiles each program that a prompt may need."""
        engine = self._engine
        engine.prepare(1, self._capacity, self.lengths)
        one = self._begin(1, self._capacity)
        for width in self.widths[1:]:
            lengths = [length for length in self.lengths if length <= self.lengths[0] // width]
            engine.prepare(width, self._capacity, lengths)
            several = moves(engine, self._begin(width, self._capacity), one)
            Held(several).copied(engine)
        for length in engine.score_chunks if engine.pads_chunks else ():
            zeros, cache = np.zeros((1, length), np.int32), self._begin(1, self._capacity)
            engine.score(cache, zeros, zeros - 1, zeros)

    def read(self, readings: Sequence[PromptReading], longest: int) -> list[PromptReading]:
        """Reads a chunk of the first of these prompts, and of others that fit beside it.

        Args:
          readings: Prompts with tokens that are not read, in the order of their turns.
          longest: Places that the chunk has at most, in all rows together.

        Returns:
          Those of which it has read something.
        """
        group = self._group(readings, longest)
        length = max(self._length(reading, longest) for reading in group)
        if group[0].job.scored:
            self._score(group[0], length)
            return group
        chunks = [r.job.tokens[r.at : r.at + min(r.part, length)] for r in group]
        rows = self._width(len(group))
        nothing: list[tuple[int, ...]] = [()] * (rows - len(group))
        starts = [*(reading.at for reading in group), *(0 for _ in nothing)]
        placed, positions = pad_left([*chunks, *nothing], PAD, length, starts)
        cache = self._engine.prefill(self._stacked(group, rows), placed, positions)
        for row, (reading, chunk) in enumerate(zip(group, chunks, strict=True)):
            reading.state = Held(cache, row)
            reading.at += len(chunk)
        return group

    def _group(self, readings: Sequence[PromptReading], longest: int) -> list[PromptReading]:
        """The first prompt with as many of the next ones as are worth the padding."""
        first, *others = readings
        if first.job.scored:
            return [first]
        able = [first, *(reading for reading in others if not reading.job.scored)]
        able = able[: self.widths[-1]]
        parts = [reading.part for reading in able]
        lengths = list(itertools.accumulate((self._length(r, longest) for r in able), max))
        for count in range(len(able), 1, -1):
            length = lengths[count - 1]
            places = self._width(count) * length
            # The first does not wait for much longer ones.
            if places > longest or length > max(self._beside, 2 * lengths[0]):
                continue
            tokens = sum(min(part, length) for part in parts[:count])
            if places <= max(self._beside, 2 * tokens):
                return able[:count]
        return [first]

    def _width(self, count: int) -> int:
        """The rows of a chunk of so many prompts."""
        if not self._engine.pads_chunks:
            return count
        return next(width for width in self.widths if width >= count)

    def _length(self, reading: PromptReading, longest: int) -> int:
        """The length of a prompt's next chunk, were it alone."""
        engine, part = self._engine, reading.part
        sizes = engine.score_chunks if reading.job.scored else self.lengths
        if not engine.pads_chunks:
            return min(part, longest, sizes[0])
        padded = -(-part // sizes[-1]) * sizes[-1]  # the padding of a part is in its last chunk
        return next(size for size in sizes if size <= max(min(longest, padded), sizes[-1]))

    def _stacked(self, group: Sequence[PromptReading], rows: int) -> Any:
        """The states of prompts in one cache, which a step may use up.

        A chunk goes over all the room that a growing state has: it is no more than they need, but
        where each size of it is compiled.
        """
        (first, *_), engine, capacity = group, self._engine, self._capacity
        if capacity is not None and not engine.pads_chunks:
            held = [capacity_of(engine.config, r.state.cache) or 0 for r in group if r.state]
            needed = engine.capacity_for(max(len(reading.job.tokens) for reading in group))
            capacity = max(needed or 0, *held, 0)
        if rows == 1 and first.state is not None:
            return engine.grow(first.state.given_up(engine), capacity)
        cache = self._begin(rows, capacity)
        for row, reading in enumerate(group):
            if reading.state is not None:
                cache = moved(engine, cache, [row], reading.state.cache, [reading.state.row])
        return cache

    def _begin(self, rows: int, capacity: int | None) -> Any:
        """A cache before the first token; copied where it is a program that makes one."""
        engine = self._engine
        if not engine.pads_chunks or rows > self._few:  # a large one is not held
            return engine.begin(rows, capacity)
        if rows not in self._empty:
            self._empty[rows] = engine.begin(rows, capacity)
        return engine.snapshot(self._empty[rows])

    def _score(self, reading: PromptReading, length: int) -> None:
        """Reads a chunk of a prompt with the log-probabilities of its tokens."""
        engine, at, tokens = self._engine, reading.at, reading.job.tokens
        count = min(reading.part, length)
        placed, positions = pad_left([tokens[at : at + count]], PAD, length, [at])
        goals, _ = pad_left([tokens[at + 1 : at + 1 + count]], PAD, length)
        cache = self._stacked([reading], 1)
        logits, logprobs, cache = engine.score(cache, placed, positions, goals)
        new = engine.on_host(logits)[0, length - count :]
        chosen = engine.on_host(logprobs)[0, length - count :]
        top = _likeliest(new, reading.job.num_logprobs or 0)
        reading.scored.append(LogProbs(chosen, *top))
        reading.state, reading.at = Held(cache), at + count


def _likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens in each place and their log-probabilities, [T, n]."""
    places: Iterator[np.ndarray] = (np.argsort(-row, kind="stable")[:count] for row in logits)
    tokens = np.array([*places], np.int64).reshape(len(logits), -1)
    most = logits.max(-1, keepdims=True)
    total = most + np.log(np.exp(logits - most).sum(-1, keepdims=True, dtype=np.float64))
    return tokens, np.take_along_axis(logits, tokens, -1) - total
