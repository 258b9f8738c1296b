"""The tokens that models are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import state_spec

LONGEST = 512  # tokens a row, unless more are asked for


class ParityBatch(NamedTuple):
    """Rows of tokens, and the parts in which they are read.

    Attributes:
      tokens: [B, T] int32.
      segment_pos: [B, T] int32; see `Model`.
      chunks: Lengths of the parts in which a second pass reads the rows; a part of one token is a
        step of decoding.
    """

    tokens: np.ndarray
    segment_pos: np.ndarray
    chunks: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """The number of tokens of each row that are read one at a time."""
        return sum(length == 1 for length in self.chunks)

    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and positions of each part of the second pass."""
        ends = np.cumsum(self.chunks)[:-1]
        return list(
            zip(np.split(self.tokens, ends, 1), np.split(self.segment_pos, ends, 1), strict=True)
        )


def default_length(config: Config) -> int:
    """Tokens a row: 64 more than a state of a fixed size has slots for, at most `LONGEST`."""
    slots = [
        spec.shape[spec.axes.index("slots")]
        for spec in state_spec(config)
        if "slots" in spec.axes and not spec.grows
    ]
    return min(max(slots, default=0) + 64, LONGEST)


def make_batch(
    config: Config,
    length: int,
    *,
    seed: int = 0,
    text: Sequence[int] | None = None,
    plain: bool = False,
) -> ParityBatch:
    """Four rows: a document, four packed ones, one after padding, a short one after much padding.

    A model reads them in one pass, and again in two chunks and then token by token.

    Args:
      config: The model.
      length: T, at least 12.
      seed: The seed of random tokens.
      text: Tokens of a text to take instead; a short text is repeated.
      plain: Make four whole documents without padding, in one chunk and then token by token, for
        implementations that can read nothing else.
    """
    if text is None:
        tokens = np.random.default_rng(seed).integers(config.vocab_size, size=(4, length))
    else:
        tokens = np.resize(np.asarray(text), (4, length))
    steps = min(8, length // 4)
    if plain:
        documents = [[length]] * 4
        chunks = (length - steps,)
    else:
        chunks = ((length - steps + 1) // 2, (length - steps) // 2)
        # Documents start in each chunk, just before decoding, and while decoding.
        first, last_of_chunk = chunks[0] // 2, sum(chunks)
        packed = [first, last_of_chunk - 2 - first, 4, steps - 2]
        documents = [[length], packed, [length - 3], [max(length // 8, 5)]]
    rows = [
        [-1] * (length - sum(lengths)) + [place for n in lengths for place in range(n)]
        for lengths in documents
    ]
    return ParityBatch(tokens.astype(np.int32), np.array(rows, np.int32), chunks + (1,) * steps)
