"""The lengths in which a long text is read, and in which its loss is computed."""

from __future__ import annotations

from collections.abc import Sequence

from recurrentgemma.common.errors import UserError

_LOSS_LOGITS = 1 << 25


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


def loss_chunk(length: int, vocab_size: int, limit: int | None = None) -> int:
    """Tokens in each of the equal chunks in which the loss of so many tokens is computed, or 1.

    Args:
      length: Number of tokens.
      vocab_size: Logits of a token.
      limit: Tokens in a chunk, at most; if None so many that a chunk has 2^25 logits.

    Raises:
      ValueError: The limit is not positive.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a chunk must have at least one token, got {limit}")
    limit = max(1, _LOSS_LOGITS // vocab_size) if limit is None else limit
    return max(1, -(-length // max(1, -(-length // limit))))
