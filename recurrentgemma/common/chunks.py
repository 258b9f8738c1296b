"""The lengths in which a long text is read."""

from __future__ import annotations

from collections.abc import Sequence


def chunk_lengths(length: int, sizes: Sequence[int], *, pad: bool) -> list[int]:
    """Lengths of the chunks in which so many tokens are read, the largest last.

    Args:
      length: Number of tokens.
      sizes: The lengths that chunks may have, each a multiple of the next.
      pad: Whether only these lengths may occur, their sum being rounded up. Else the first chunk is
        what the largest size leaves.
    """
    if not pad:
        rest = length % sizes[0]
        return [rest] * (rest > 0) + [sizes[0]] * (length // sizes[0])
    length = -(-length // sizes[-1]) * sizes[-1]
    chunks = []
    for size in sizes:
        chunks += [size] * (length // size)
        length %= size
    return chunks[::-1]
