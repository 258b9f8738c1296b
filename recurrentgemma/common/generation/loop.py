"""The generation loop: tokens for every row of a state, a step at a time."""

from __future__ import annotations

import abc
import array
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.generation.stops import RowText, Stops
from recurrentgemma.common.generation.strategies import Greedy, Sampling, uniform
from recurrentgemma.common.model.state import State
from recurrentgemma.common.tokenizer import Tokenizer


class LogProbs(NamedTuple):
    """Log-probabilities under the model itself: softmax(logits), before any sampling strategy.

    Attributes:
      chosen: Of the tokens generated, [N] or a number.
      top_tokens: The likeliest tokens in each place, most likely first, [N, n] or [n].
      top: Their log-probabilities.
    """

    chosen: np.ndarray
    top_tokens: np.ndarray
    top: np.ndarray


class Request(NamedTuple):
    """What is asked of a generation.

    Attributes:
      steps: At most this many tokens a row.
      sampling: How they are chosen.
      keys: Each row's random stream; none where nothing is drawn.
      stops: What ends a row.
      num_logprobs: How many of the likeliest tokens to report beside the chosen one; None reports
        no log-probabilities at all.
    """

    steps: int
    sampling: Sampling
    keys: Sequence[np.ndarray]
    stops: Stops
    num_logprobs: int | None


class Step(NamedTuple):
    """One generated token a row.

    Attributes:
      tokens: Token ids, [B].
      active: The rows that they count for: those that had not ended before, [B].
      texts: What became certain of each row's text.
      logits: What the tokens were chosen from, [B, V], on the device.
      logprobs: [B] and [B, n]; None if not asked for.
    """

    tokens: np.ndarray
    active: np.ndarray
    texts: list[str]
    logits: Any
    logprobs: LogProbs | None


class Engine(abc.ABC):
    """What a framework does for the loop. A `run` is a model's state that steps may change."""

    tokenizer: Tokenizer

    @abc.abstractmethod
    def _read(self, state: State) -> tuple[Any, np.ndarray, np.ndarray]:
        """Reads all pending tokens but the last: a run, those last ones, their positions, [B]."""

    @abc.abstractmethod
    def _feed(self, run: Any, tokens: np.ndarray, segment_pos: np.ndarray) -> tuple[Any, Any]:
        """Reads a token a row, [B]: the logits after it, [B, V], and the run."""

    @abc.abstractmethod
    def _on_device(self, values: np.ndarray) -> Any:
        """An array on the model's device."""

    @abc.abstractmethod
    def _choose(
        self, request: Request, logits: Any, number: np.ndarray, seen: Any, fed: np.ndarray
    ) -> tuple[Any, Any]:
        """The framework's `Choice`, and `seen` (if any) with the tokens just fed, [B]."""

    @abc.abstractmethod
    def _snapshot(self, run: Any) -> Any:
        """A copy of a run's cache, which no later step changes."""


class Generation:
    """Iterates over the steps of a generation. It may be left at any point, and `state` is good.

    Attributes:
      texts: The rows' texts so far, with why they ended.
      generated: The rows' tokens so far.
    """

    def __init__(self, engine: Engine, state: State, request: Request) -> None:
        self.texts = [RowText(engine.tokenizer, request.stops) for _ in range(state.num_rows)]
        self._engine, self._origin, self._request = engine, state, request
        self.generated = [array.array("i") for _ in range(state.num_rows)]
        self._run: Any = None  # also while a step changes it

    def __iter__(self) -> Generator[Step]:
        engine, origin, request = self._engine, self._origin, self._request
        if not request.steps:
            return
        run, tokens, position = engine._read(origin)
        penalised = request.sampling.repetition_penalty != 1
        seen = engine._on_device(origin.seen) if penalised else None
        active = np.ones(origin.num_rows, bool)
        number = np.ones(origin.num_rows, np.float32)
        for step in range(request.steps):
            self._run = None
            # A row that has ended is fed padding, which changes nothing.
            fed = np.where(active, tokens, engine.tokenizer.pad_id).astype(np.int32)
            logits, run = engine._feed(run, fed, np.where(active, position, -1).astype(np.int32))
            position = position + active
            if not isinstance(request.sampling, Greedy):
                number = uniform(request.keys, position)
            choice, seen = engine._choose(request, logits, number, seen, fed)
            tokens = np.asarray(choice.tokens)
            texts = [""] * origin.num_rows
            rows = np.flatnonzero(active)
            for row in rows:
                token = int(tokens[row])
                texts[row] = self.texts[row].add(token, last=step + 1 == request.steps)
                self.generated[row].append(token)
            self._run = run
            yield Step(tokens, active, texts, logits, _logprobs(choice))
            active = active.copy()
            active[rows] = [not self.texts[row].stopped for row in rows]
            if not active.any():
                return

    @property
    def state(self) -> State:
        """The state after all that was generated so far."""
        if self._run is None:  # a step was cut off, or none was made: read again from the start
            return self._origin.extended(self.generated)
        generated = self.generated
        pairs = zip(self._origin.num_tokens, generated, strict=True)
        return State(
            self._origin.config,
            self._engine._snapshot(self._run),
            tuple(length + len(new) - 1 for length, new in pairs),
            tuple((new[-1],) for new in generated),
            self._origin.extended(generated).seen,
        )


def _logprobs(choice: Any) -> LogProbs | None:
    if choice.logprobs is None:
        return None
    return LogProbs(*map(np.asarray, choice[1:]))


class Stream(Iterator[tuple[int, str]]):
    """One row's tokens, each with the text that became certain with it.

    The text is never half a character, nothing of a stop string, and may be empty. Together the
    texts are what a call returns. Leaving the loop, `close` and Ctrl-C end the generation, and
    `state` goes on from there.

    Attributes:
      logprobs: Log-probabilities of the last token; None if not asked for.
    """

    def __init__(self, generation: Generation) -> None:
        self.logprobs: LogProbs | None = None
        self._generation = generation
        self._steps = iter(generation)

    def __next__(self) -> tuple[int, str]:
        step = next(self._steps)
        if step.logprobs is not None:
            self.logprobs = LogProbs(*(part[0] for part in step.logprobs))
        return int(step.tokens[0]), step.texts[0]

    def close(self) -> None:
        """Ends the generation."""
        self._steps.close()

    @property
    def state(self) -> State:
        """The state after the last token; a copy, which later ones do not change."""
        return self._generation.state

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens so far: those that `state` has beyond what was continued."""
        return tuple(self._generation.generated[0])

    @property
    def finish_reason(self) -> str:
        """Why the text ended: "eos", "end_of_turn", "stop_id", "stop_string", or "length"."""
        return self._generation.texts[0].finish_reason
