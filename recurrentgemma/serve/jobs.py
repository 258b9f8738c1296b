"""What a client asks of the model: one prompt, continued by one row or several."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.generation.engine import LogProbs
from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.stops import RowText
from recurrentgemma.common.tokenizer import Tokenizer

_numbers = itertools.count()


class Growth(NamedTuple):
    """The tokens that a row has got since its last growth.

    Attributes:
      row: Which row of the job.
      tokens: Their ids.
      text: The text that became certain with them.
      logprobs: The log-probability of each and those of the likeliest in its place; None if not
        asked for.
      finish_reason: Why the row ended with the last of them; None where the row goes on.
    """

    row: int
    tokens: list[int]
    text: str
    logprobs: list[LogProbs] | None
    finish_reason: str | None


class PromptRead(NamedTuple):
    """The prompt is read.

    Attributes:
      cached: How many of its tokens a kept state had read before.
      scores: The log-probabilities of its tokens from the second on, if asked for.
    """

    cached: int
    scores: LogProbs | None


class Failed(NamedTuple):
    """The job ends without an answer.

    Attributes:
      error: Why.
    """

    error: Exception


Event = Growth | PromptRead | Failed


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt and the rows that continue it.

    Attributes:
      tokens: The prompt, from BOS on.
      rows: What each row is asked to generate; none asks for the prompt's scores alone.
      num_logprobs: How many of the likeliest tokens to report; None reports no log-probabilities.
      scored: Whether the prompt's own log-probabilities are asked for.
      marks: Places in the prompt after which the state is worth keeping.
      salt: Kept states are shared by jobs with the same salt.
      priority: The job with the lowest number goes first, and takes the slot of a higher one.
      listener: Whoever waits for the events; the scheduler only hands it back.
      number: Jobs of the same priority go in this order.
      cancelled: Whether nobody waits for the answer.
    """

    tokens: tuple[int, ...]
    rows: Sequence[RowRequest]
    num_logprobs: int | None = None
    scored: bool = False
    marks: tuple[int, ...] = ()
    salt: str = ""
    priority: int = 0
    listener: Any = None
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))
    cancelled: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """The job with the least rank goes first."""
        return self.priority, self.number

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest continuation."""
        return len(self.tokens) + max((row.steps for row in self.rows), default=0)


class SlotRow:
    """A text that grows, in a slot or waiting for one.

    Attributes:
      job: What it belongs to.
      index: Which row of the job.
      asked: How it goes on.
      text: Its text so far.
      generated: Its new tokens so far.
      left: How many more tokens it may have.
      state: Its state, one row of a cache, while it waits; None in a slot.
      num_read: How many tokens the state has read.
      exact: Whether the state has read all tokens but the last, and no other.
      num_told: How many of the new tokens the client has got.
    """

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer, state: Any) -> None:
        self.job, self.index, self.asked = job, index, job.rows[index]
        self.text = RowText(tokenizer, self.asked.stops)
        self.generated: list[int] = []
        self.left, self.state, self.exact = self.asked.steps, state, True
        self.num_read = len(job.tokens) - 1
        self.num_told = 0
        self._said, self._logprobs = "", list[LogProbs]()  # not told yet

    @property
    def last(self) -> int:
        """The token to feed next."""
        return self.generated[-1] if self.generated else self.job.tokens[-1]

    @property
    def tokens(self) -> list[int]:
        """All its tokens, with the prompt's."""
        return [*self.job.tokens, *self.generated]

    def add(self, token: int, logprobs: LogProbs | None) -> None:
        """Goes on by a token. Only where a string may end the row is the text made at once."""
        self.generated.append(token)
        self.left -= 1
        if logprobs is not None:
            self._logprobs.append(logprobs)
        stops = self.asked.stops
        if stops.strings:
            self._said += self.text.add(token, last=not self.left)
        if self.text.stopped or token in stops.ids:
            self.left = 0

    def told(self) -> Growth:
        """What the client does not know yet; from now on it does."""
        tokens = self.generated[self.num_told :]
        self.num_told = len(self.generated)
        if not self.asked.stops.strings:
            self._said = self.text.extend(tokens, last=not self.left)
        text, self._said = self._said, ""
        logprobs, self._logprobs = self._logprobs, []
        reason = None if self.left else self.text.finish_reason
        reported = None if self.job.num_logprobs is None else logprobs
        return Growth(self.index, tokens, text, reported, reason)


def one_place(logprobs: LogProbs | None, place: tuple[int, int], count: int) -> LogProbs | None:
    """The log-probabilities in one place of a batch's, with so many of the likeliest tokens."""
    if logprobs is None:
        return None
    chosen, tokens, top = (np.asarray(part)[place] for part in logprobs)
    return LogProbs(float(chosen), tokens[:count].tolist(), top[:count].tolist())
