"""The generation loop: tokens for every row of a state, one after the other."""

from __future__ import annotations

import array
import copy
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.generation.engine import LONG, Engine, LogProbs, Sampled
from recurrentgemma.common.generation.prefill import PAD, nonfinite_logits, read
from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.settings import row_settings, variant_of
from recurrentgemma.common.generation.stops import RowText
from recurrentgemma.common.generation.strategies import uniform
from recurrentgemma.common.model.state import State
from recurrentgemma.common.tokenizer import Tokenizer


class NewTokens(NamedTuple):
    """One generated token a row.

    Attributes:
      tokens: Token ids, [B].
      active: The rows that had not ended before; the other tokens mean nothing, [B].
      texts: What became certain of each row's text.
      logits: What the tokens were chosen from, [B, V], on the device; None if not asked for.
      logprobs: [B] and [B, n]; None if not asked for.
    """

    tokens: np.ndarray
    active: np.ndarray
    texts: list[str]
    logits: Any
    logprobs: LogProbs | None


class Generation:
    """Iterates over the new tokens of a batch. It may be left at any point: `state` is right.

    Iterating again, or over a copy, goes on from where it was left; so does one that was pickled.

    The engine decodes k tokens a row at a time. It checks stop ids itself; the text, with its stop
    strings, is put together here, and tokens behind a stop string are dropped.

    Attributes:
      engine: What decodes.
      variant: The parts of a step that the rows need.
      texts: The rows' texts so far, with why they ended.
      generated: The rows' tokens so far.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        state: State,
        rows: Sequence[RowRequest],
        num_logprobs: int | None = None,
        return_logits: bool = False,
    ) -> None:
        self.texts = [RowText(tokenizer, row.stops) for row in rows]
        self.generated = [array.array("i") for _ in rows]
        vocab_size = engine.config.vocab_size
        self.engine, self._origin, self._rows = engine, state, rows
        self.variant = variant_of(rows, vocab_size, num_logprobs, return_logits)
        # A cache, None while a step uses it up, and how many tokens were fed to each of its rows.
        self._cache: Any = None
        self._fed = np.zeros(len(rows), np.int32)
        # Rows of a cache as they were before tokens behind a stop string were fed to them.
        self._kept_rows: dict[int, Any] = {}

    def __copy__(self) -> Generation:
        """Another generation that goes on from here, with the same engine."""
        fork = object.__new__(Generation)
        vars(fork).update(vars(self))
        fork.texts = list(map(copy.copy, self.texts))
        fork.generated = [new[:] for new in self.generated]
        fork._cache = None if self._cache is None else self.engine.snapshot(self._cache)
        fork._kept_rows = {**self._kept_rows}
        return fork

    def __iter__(self) -> Generator[NewTokens]:
        engine, rows, variant = self.engine, self._rows, self.variant
        done = np.array([len(new) for new in self.generated], np.int32)
        stopped = np.array([text.stopped for text in self.texts])
        left = np.where(stopped, 0, np.array([row.steps for row in rows], np.int32) - done)
        if not left.any():
            return
        start = self.state
        cache, tokens, position = read(engine, start, int(left.max()))
        self._fed, self._kept_rows = done, {}
        settings = engine.on_device(row_settings(rows, engine.config.vocab_size))
        seen = engine.on_device(self._occurrences()) if variant.penalised else None
        keys = [row.key for row in rows]
        burst = 1  # the first token comes as soon as it can
        most = engine.burst if left.max() < LONG else max(engine.burst, engine.long_burst)
        while left.any():
            active = left > 0
            before = self._cache = engine.snapshot(cache) if burst > 1 else None
            sampled, cache, seen = engine.decode(
                variant,
                settings,
                cache,
                seen,
                np.where(active, tokens, PAD).astype(np.int32),
                np.where(active, position, -1).astype(np.int32),
                left,
                uniform(keys, position + 1, burst),
            )
            new_tokens, logprobs = on_host(engine, sampled)
            fed = np.zeros_like(left)
            for place, tokens in enumerate(new_tokens):
                active = left > 0
                fed += active
                left = left - active
                texts = [""] * len(rows)
                for row in np.flatnonzero(active).tolist():
                    texts[row] = self._add(row, int(tokens[row]), last=not left[row])
                    if self.texts[row].stopped:
                        left[row] = 0
                        if self.texts[row].finish_reason == "stop_string" and place + 1 < burst:
                            self._kept_rows[row] = engine.take(before, np.array([row]))
                over = place + 1 == burst or not left.any()
                if over:
                    self._cache = cache
                    fed[[*self._kept_rows]] = 0
                    self._fed = self._fed + fed
                yield NewTokens(
                    tokens,
                    active,
                    texts,
                    None if sampled.logits is None else sampled.logits[place],
                    None if logprobs is None else LogProbs(*(part[place] for part in logprobs)),
                )
                if over:
                    break
            position = position + fed
            burst = most if 4 * left.max() >= 3 * most else 1  # a few steps past the end

    def _add(self, row: int, token: int, last: bool) -> str:
        if token < 0:
            raise nonfinite_logits(self.engine, self._origin.extended(self.generated), row)
        self.generated[row].append(token)
        return self.texts[row].add(token, last)

    def _occurrences(self) -> np.ndarray:
        """How each row has each token so far; see `Engine.choose`."""
        seen = self._origin.seen.astype(np.int32)
        for row, new in enumerate(self.generated):
            np.add.at(seen[row], np.array(new, np.int32), 2)
        return seen

    @property
    def state(self) -> State:
        """The state after all that was generated so far."""
        origin, generated = self._origin, self.generated
        whole = origin.extended(generated)
        if self._cache is None:  # a step was cut off, or none was made: read again from the start
            return whole
        cache = self.engine.snapshot(self._cache)
        for row, kept in self._kept_rows.items():
            cache = self.engine.put(cache, np.array([row]), kept)
        pairs = zip(origin.num_tokens, self._fed.tolist(), strict=True)
        return State(
            origin.config,
            cache,
            tuple(length - 1 + fed for length, fed in pairs),
            tuple(
                (last, *new)[fed:]
                for (*_, last), new, fed in zip(origin.pending, generated, self._fed, strict=True)
            ),
            whole.seen,
        )


def on_host(engine: Engine, sampled: Sampled) -> tuple[np.ndarray, LogProbs | None]:
    """The tokens and their log-probabilities as NumPy arrays."""
    tokens = engine.on_host(sampled.tokens)
    if sampled.logprobs is None:
        return tokens, None
    return tokens, LogProbs(*map(engine.on_host, sampled.logprobs))


class TokenStream(Iterator[tuple[int, str]]):
    """One row's tokens, each with the text that became certain with it.

    The text is never half a character, holds nothing of a stop string, and may be empty. Together
    the texts are what a call returns. Leaving the loop, `close` and Ctrl-C end the generation, and
    `state` goes on from there.

    Attributes:
      logprobs: Log-probabilities of the last token; None if not asked for.
    """

    def __init__(self, generation: Generation) -> None:
        self.logprobs: LogProbs | None = None
        self._closed = False
        self._generation = generation
        self._steps = iter(generation)

    def __getstate__(self) -> dict[str, Any]:
        """Without the running step, which begins again where this stream stands."""
        return {name: value for name, value in vars(self).items() if name != "_steps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._steps = iter(self._generation)
        if self._closed:
            self._steps.close()

    def __copy__(self) -> TokenStream:
        """Another stream that goes on from here, with the same model."""
        fork = object.__new__(TokenStream)
        fork.__setstate__(self.__getstate__() | {"_generation": copy.copy(self._generation)})
        return fork

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenStream:
        """A copy: the model is shared."""
        return self.__copy__()

    def __next__(self) -> tuple[int, str]:
        step = next(self._steps)
        if step.logprobs is not None:
            self.logprobs = LogProbs(*(part[0] for part in step.logprobs))
        return int(step.tokens[0]), step.texts[0]

    def close(self) -> None:
        """Ends the generation."""
        self._closed = True
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
