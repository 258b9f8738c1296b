"""Checks of a model's inputs. Only arrays on the host are checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from recurrentgemma.common.errors import UserError


def check_inputs(tokens: Any, segment_pos: Any, vocab_size: int) -> None:
    """Raises `ValueError` for wrong values in NumPy arrays; other arrays are not checked.

    Args:
      tokens: Token ids, [B, T].
      segment_pos: Their positions, [B, T].
      vocab_size: Number of tokens.
    """
    if isinstance(tokens, np.ndarray):
        check_ids("tokens", tokens, vocab_size)
    if isinstance(segment_pos, np.ndarray) and segment_pos.ndim == 2:
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
