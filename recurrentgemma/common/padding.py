"""Prompts of several lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recurrentgemma.common.errors import UserError


def pad_left(
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    length: int | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Puts prompts into one batch, padded on the left, with positions (-1 at padding).

    Args:
      prompts: Token ids of each row.
      pad_id: The token id of padding.
      length: Length of the batch, at least the longest prompt's; that length if None.
      starts: The position of each row's first token; 0 if None.

    Returns:
      tokens and segment_pos, [B, T] int32.
    """
    longest = max(map(len, prompts), default=0)
    length = longest if length is None else length
    if length < longest:
        raise UserError(f"length must be at least the longest prompt's {longest}, got {length}")
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    segment_pos = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        if prompt:
            tokens[row, -len(prompt) :] = prompt
            start = 0 if starts is None else starts[row]
            segment_pos[row, -len(prompt) :] = np.arange(start, start + len(prompt))
    return tokens, segment_pos
