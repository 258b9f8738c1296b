"""Printing a sampler's stream, and timing it."""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from recurrentgemma.cli.console import working

if TYPE_CHECKING:
    from recurrentgemma.common.generation.engine import LogProbs
    from recurrentgemma.common.generation.loop import TokenStream


class TimedText(NamedTuple):
    """A generated text, and how fast it came.

    Attributes:
      tokens: Token ids, also the one that stopped the text.
      text: Their text.
      first_token_s: Seconds to the first token, in which JAX may compile and the prompt is read.
      tokens_per_second: The rate after that; None for fewer than two tokens.
      finish_reason: Why the text ended.
      logprobs: Log-probabilities in each place, if asked for.
    """

    tokens: list[int]
    text: str
    first_token_s: float
    tokens_per_second: float | None
    finish_reason: str
    logprobs: list[LogProbs]

    @property
    def speed(self) -> str:
        """The number of tokens and the times, in words."""
        number = f"{len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}"
        rate = f" at {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        return f"{number}{rate}, first after {self.first_token_s:.2f} s"


def generate(stream: TokenStream, before: str | None) -> TimedText:
    """Runs a sampler's stream, writing its text to stdout as it comes.

    Nothing is written before the first token: the spinner would wipe it away.

    Args:
      stream: The stream, from `Sampler.stream`.
      before: Text to write first; None writes nothing at all.
    """
    started = time.perf_counter()
    with working("Reading the prompt"):
        first = list(itertools.islice(stream, 1))
    first_token_s = time.perf_counter() - started
    _write(before)
    times: list[float] = []
    tokens: list[int] = []
    pieces: list[str] = []
    logprobs: list[Any] = []
    for token, piece in itertools.chain(first, stream):
        times.append(time.perf_counter())
        tokens.append(token)
        pieces.append(piece)
        if stream.logprobs is not None:
            logprobs.append(stream.logprobs)
        if before is not None:
            _write(piece)
    if before is not None:
        _write("\n")
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    text = "".join(pieces)
    return TimedText(tokens, text, first_token_s, rate, stream.finish_reason, logprobs)


def _write(text: str | None) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
