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
from recurrentgemma.torch.runtime.known import is_known
from recurrentgemma.torch.scan import wide_dtype
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
    if mixer.reach is not None or mixer.soft_cap or not is_known(segment_pos):
        return slots
    return min(slots, -(-(int(segment_pos.max()) + 1) // USED_SLOTS) * USED_SLOTS)


def known_place(mixer: Attention, segment_pos: Positions, cache: AttentionBlockCache) -> int | None:
    """The place of the token in its document, where the host knows it and all rows have the same.

    None elsewhere, and where a document begins or the state lacks some of its tokens.
    """
    if torch.is_grad_enabled() or not (is_known(segment_pos) and is_known(cache.num_tokens)):
        return None
    if _TERMS.get().reproducible and len(segment_pos) > 1:
        return None
    numbers = {*segment_pos[:, 0].tolist(), *cache.num_tokens.tolist()}
    if len(numbers) != 1:
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
    wide = cache.keys.dtype == q_b1nh.dtype == wide_dtype(q_b1nh.dtype)
    if wide and place >= slots and is_given_up():
        encoded = attend_also(q_b1nh, cache.keys, cache.values, k_b1kh, v_b1kh, mixer)
        for ring, new in pairs:  # now the token may take the place of one that it sees
            ring[:, place % slots] = new[:, 0]
        return encoded, cache._replace(num_tokens=cache.num_tokens + 1)
    keys, values = (_with_token(ring, new, place) for ring, new in pairs)
    seen = min(place, slots) + 1
    encoded = attend_masked(q_b1nh, _first(seen, keys), _first(seen, values), None, mixer)
    rings = _first(slots, keys), _first(slots, values)
    return encoded, AttentionBlockCache(*rings, cache.num_tokens + 1)


def _first(count: int, z: Tensor) -> Tensor:
    return z if z.shape[1] == count else z[:, :count]


def _with_token(
    ring_bskh: Float[Tensor, "b s kv h"], new_b1kh: Float[Tensor, "b 1 kv h"], place: int
) -> Float[Tensor, "b _ kv h"]:
    """The ring with a token and, behind it, what the token replaces and still sees."""
    slot = place % ring_bskh.shape[1]
    if slot == place and ring_bskh.dtype == new_b1kh.dtype and is_given_up():
        ring_bskh[:, slot] = new_b1kh[:, 0]
        return ring_bskh
    before, replaced, after = ring_bskh.to(new_b1kh.dtype).tensor_split([slot, slot + 1], 1)
    return torch.cat([before, new_b1kh, after, replaced], 1)
