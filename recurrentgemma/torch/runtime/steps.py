"""A token in rows whose place the host knows: the step of attention in fewer operations."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from recurrentgemma.common.model.mixers import Attention, AttentionBlockCache
from recurrentgemma.torch.cache import Positions
from recurrentgemma.torch.runtime.known import is_known, number, places
from recurrentgemma.torch.softmax import attend_also, attend_masked

USED_SLOTS = 512  # whole blocks of PyTorch's kernel


class _Terms(NamedTuple):
    given_up: bool = False
    reproducible: bool = False


_NONE = _Terms()
_TERMS = contextvars.ContextVar("terms", default=_NONE)


@contextlib.contextmanager
def giving_up(reproducible: bool = False) -> Iterator[None]:
    """Inside, a step may write into the state that it is given: nobody uses it any more.

    Args:
      reproducible: Whether the step computes rows at one place as it computes rows at several:
        each is then the same to the bit whatever the place of the others.
    """
    before = _TERMS.set(_Terms(True, reproducible))
    try:
        yield
    finally:
        _TERMS.reset(before)


def is_given_up() -> bool:
    """Whether a step may write into its state; see `giving_up`."""
    compiled = torch.compiler.is_compiling()
    return not compiled and not torch.is_grad_enabled() and _TERMS.get().given_up


def used_slots(mixer: Attention, segment_pos: Positions, slots: int) -> int:
    """How many slots of a state a step reads; further ones, without tokens, would change no bit.

    In a growing state they are a multiple of `USED_SLOTS` where the host knows the positions. A
    soft cap needs all: without PyTorch's kernel their number changes the last bits.
    """
    found = places(segment_pos)
    if mixer.reach is not None or mixer.soft_cap or not found:
        return slots
    return min(slots, -(-(max(found) + 1) // USED_SLOTS) * USED_SLOTS)


def known_place(mixer: Attention, segment_pos: Positions, cache: AttentionBlockCache) -> int | None:
    """The place of the token in its document, where the host knows it and all rows have the same.

    None elsewhere, and where a document begins or the state lacks some of its tokens.
    """
    found = places(segment_pos)
    if found is None or not is_known(cache.num_tokens):
        return None
    numbers = {*found, *cache.num_tokens.tolist()}
    if len(numbers) != 1 or (_TERMS.get().reproducible and len(found) > 1):
        return None
    (place,) = numbers
    fits = mixer.reach is not None or place < cache.keys.shape[1]
    return place if place > 0 and fits else None


def step_at(
    mixer: Attention,
    q_b1nh: Float[Tensor, "b 1 n h"],
    k_b1kh: Float[Tensor, "b 1 kv h"],
    v_b1kh: Float[Tensor, "b 1 kv h"],
    place: int,
    cache: AttentionBlockCache,
) -> tuple[Float[Tensor, "b 1 n h"], AttentionBlockCache]:
    """The step of rows at one place: without a mask, and in place inside `giving_up`."""
    slots = cache.keys.shape[1]
    pairs = ((cache.keys, k_b1kh), (cache.values, v_b1kh))
    if place < slots:  # the slot of the token holds nothing
        rings = [_with_token(*pair, place) for pair in pairs]
        keys, values = (ring[:, : place + 1] for ring in rings)
        encoded = attend_masked(q_b1nh, keys, values, None, mixer)
    else:  # the token still sees what it replaces
        encoded = attend_also(q_b1nh, *pairs[0], *pairs[1], mixer)
        rings = [_with_token(*pair, place % slots) for pair in pairs]
    num_tokens = cache.num_tokens + number(1, cache.num_tokens)
    return encoded, AttentionBlockCache(rings[0], rings[1], num_tokens)


def _with_token(
    ring_bskh: Float[Tensor, "b s kv h"], new_b1kh: Float[Tensor, "b 1 kv h"], slot: int
) -> Float[Tensor, "b s kv h"]:
    """The ring with a token in a slot."""
    ring_bskh = ring_bskh.to(new_b1kh.dtype)
    ring_bskh = ring_bskh if is_given_up() else ring_bskh.clone()
    ring_bskh[:, slot] = new_b1kh[:, 0]
    return ring_bskh
