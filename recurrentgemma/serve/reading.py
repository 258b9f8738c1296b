"""A prompt on its way into a state, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from recurrentgemma.common.generation.engine import Engine, LogProbs
from recurrentgemma.common.generation.prefill import PAD
from recurrentgemma.common.padding import pad_left
from recurrentgemma.serve.jobs import Job


class PromptReading:
    """The state of one row after the tokens of a job's prompt, all but the last.

    Attributes:
      job: Whose prompt it is.
      state: The state so far, one row of a cache.
      at: How many tokens it has read.
      marks: Places in the prompt where a chunk ends and the state is worth keeping.
      cached: How many tokens it had read when reading began.
      waited: How many chunks of others were read since the last of its own.
    """

    def __init__(
        self, engine: Engine, job: Job, cached: int, state: Any, grid: int = 1
    ) -> None:  # fmt: skip
        """Begins after the tokens that a state has read; marks are moved down to a grid.

        A prompt that is scored has no marks: other programs read it, which round differently.
        """
        self.job, self.at, self.cached, self.state = job, cached, cached, state
        self.marks = [] if job.scored else [mark - mark % grid for mark in job.marks]
        self.waited = 0
        self._engine = engine
        self._scores: list[LogProbs] = []

    @property
    def num_left(self) -> int:
        """How many tokens are not read yet."""
        return len(self.job.tokens) - 1 - self.at

    def read(self, longest: int) -> None:
        """Reads a chunk of at most so many tokens; it ends at the next mark."""
        engine, tokens = self._engine, self.job.tokens
        marks = [mark for mark in self.marks if self.at < mark < len(tokens)]
        left = min(marks, default=len(tokens) - 1) - self.at
        sizes = engine.score_chunks if self.job.scored else engine.prefill_chunks
        length = count = min(left, longest, sizes[0])
        if engine.pads_chunks:  # the padding of a part is in its last chunk
            padded = -(-left // sizes[-1]) * sizes[-1]
            length = next(size for size in sizes if size <= max(min(longest, padded), sizes[-1]))
            count = min(left, length)
        chunk = tokens[self.at : self.at + count]
        placed, positions = pad_left([chunk], PAD, length, [self.at])
        if self.job.scored:
            goals, _ = pad_left([tokens[self.at + 1 : self.at + 1 + count]], PAD, length)
            logits, logprobs, self.state = engine.score(self.state, placed, positions, goals)
            new = engine.on_host(logits)[0, length - count :]
            chosen = engine.on_host(logprobs)[0, length - count :]
            self._scores.append(LogProbs(chosen, *_likeliest(new, self.job.num_logprobs or 0)))
        else:
            self.state = engine.prefill(self.state, placed, positions)
        self.at += count

    @property
    def scores(self) -> LogProbs | None:
        """The log-probabilities of all tokens but the first; None if not asked for."""
        if not self.job.scored:
            return None
        if not self._scores:
            return LogProbs(np.zeros(0), *np.zeros((2, 0, self.job.num_logprobs or 0)))
        return LogProbs(*map(np.concatenate, zip(*self._scores, strict=True)))


def _likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens in each place and their log-probabilities, [T, n]."""
    places: Iterator[np.ndarray] = (np.argsort(-row, kind="stable")[:count] for row in logits)
    tokens = np.array([*places], np.int64).reshape(len(logits), -1)
    most = logits.max(-1, keepdims=True)
    total = most + np.log(np.exp(logits - most).sum(-1, keepdims=True, dtype=np.float64))
    return tokens, np.take_along_axis(logits, tokens, -1) - total
