"""Checks of a model's inputs. Only values on the host are checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from recurrentgemma.common.errors import UserError


def check_inputs(tokens: Any, segment_pos: Any, vocab_size: int) -> None:
    """Raises `ValueError` for inputs that a model cannot read; values are checked in NumPy's alone.

    Args:
      tokens: Token ids, [B, T], an array of any framework.
      segment_pos: Their positions, [B, T].
      vocab_size: Number of tokens.
    """
    if not all("int" in str(z.dtype) for z in (tokens, segment_pos)):
        raise UserError(
            f"tokens and segment_pos must be integers, got {tokens.dtype} and {segment_pos.dtype}"
        )
    if tokens.ndim != 2 or tokens.shape != segment_pos.shape:
        raise UserError(
            "tokens and segment_pos must have one shape [B, T], "
            f"got {tuple(tokens.shape)} and {tuple(segment_pos.shape)}"
        )
    if isinstance(tokens, np.ndarray):
        check_ids("tokens", tokens, vocab_size)
    if isinstance(segment_pos, np.ndarray):
        behind = (segment_pos[:, 1:] < 0) & (segment_pos[:, :-1] >= 0)
        if behind.any():
            row, place = np.argwhere(behind)[0]
            raise UserError(
                "padding (position -1) may only come before a row's tokens, got it behind a token "
                f"in row {row} at {place + 1}: the state after it would be wrong"
            )


def check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raises `ValueError` for an id outside the vocabulary."""
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        place = tuple(np.argwhere(outside)[0].tolist())
        raise UserError(
            f"{name} must be from 0 to {vocab_size - 1}, the vocabulary's last, got "
            f"{ids[place]} at {place}"
        )


def check_targets(targets: Any, weights: Any, vocab_size: int) -> None:
    """Raises `ValueError` for a target outside the vocabulary whose weight is not 0."""
    if isinstance(targets, np.ndarray) and isinstance(weights, np.ndarray):
        check_ids("targets", np.where(weights != 0, targets, 0), vocab_size)
