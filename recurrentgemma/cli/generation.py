"""Printing a sampler's stream, and timing it."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from recurrentgemma.cli.console import working


class Run(NamedTuple):
    """What was generated, and how fast.

    Attributes:
      tokens: Token ids, with the one that stopped it.
      text: Their text.
      first_token_s: Seconds to the first token: reading the prompt, and what JAX compiles.
      tokens_per_second: The rate after that; None of fewer than two tokens.
    """

    tokens: list[int]
    text: str
    first_token_s: float
    tokens_per_second: float | None

    @property
    def speed(self) -> str:
        """The number of tokens and the times, in words."""
        number = f"{len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}"
        rate = f" at {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        return f"{number}{rate}, first after {self.first_token_s:.2f} s"


def generate(steps: Iterator[tuple[int, str]], before: str | None) -> Run:
    """Runs a sampler's stream, writing its text to stdout as it comes.

    Nothing is written until the first token is there, since the spinner would wipe it away.

    Args:
      steps: What `Sampler.stream` returned.
      before: What to write before the text; None writes nothing at all.
    """
    started = time.perf_counter()
    with working("Reading the prompt"):
        first = list(itertools.islice(steps, 1))
    first_token_s = time.perf_counter() - started
    _write(before)
    times: list[float] = []
    tokens: list[int] = []
    pieces: list[str] = []
    for token, piece in itertools.chain(first, steps):
        times.append(time.perf_counter())
        tokens.append(token)
        pieces.append(piece)
        if before is not None:
            _write(piece)
    if before is not None:
        _write("\n")
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Run(tokens, "".join(pieces), first_token_s, rate)


def _write(text: str | None) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
