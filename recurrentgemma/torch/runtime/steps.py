"""A token in rows whose places the host knows: the step of attention in fewer operations."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recurrentgemma.common.model.mixers import Attention, AttentionBlockCache
from recurrentgemma.torch.cache import Positions
from recurrentgemma.torch.runtime.known import is_known, number, places
from recurrentgemma.torch.softmax import attend_also, attend_masked

USED_SLOTS = 512  # whole blocks of PyTorch's kernel
_R = TypeVar("_R")


class _Terms(NamedTuple):
    given_up: bool = False
    reproducible: bool = False
    last: dict[Any, Any] | None = None  # what `once_for_rows` keeps


class Rows(NamedTuple):
    """What the host knows of the rows of a step.

    Attributes:
      places: The place of each row's token in its document; -1 is padding.
      held: How many tokens each row's state has.
    """

    places: tuple[int, ...]
    held: tuple[int, ...]


_NONE = _Terms()
_TERMS = contextvars.ContextVar("terms", default=_NONE)


@contextlib.contextmanager
def giving_up(reproducible: bool = False) -> Iterator[None]:
    """Inside, a step may write into the state that it is given: nobody uses it any more.

    Args:
      reproducible: Whether the step computes rows at one place as it computes rows at several:
        each is then the same to the bit whatever the place of the others.
    """
    before = _TERMS.set(_Terms(True, reproducible, {}))
    try:
        yield
    finally:
        _TERMS.reset(before)


def is_given_up() -> bool:
    """Whether a step may write into its state; see `giving_up`."""
    compiled = torch.compiler.is_compiling()
    return not compiled and not torch.is_grad_enabled() and _TERMS.get().given_up


def once_for_rows(function: Callable[[Tensor], _R], x: Tensor) -> _R:
    """`function(x)`, which inside `giving_up` is kept for the next product with the same rows."""
    last = _TERMS.get().last if is_given_up() else None
    if last is None or x.is_inference():  # which counts no changes of x
        return function(x)
    key = function, x.data_ptr(), x.shape, x.stride(), x.dtype, x._version
    if key not in last:
        last.clear()
        last[key] = function(x), x  # the address stays in use
    return last[key][0]


def used_slots(mixer: Attention, segment_pos: Positions, slots: int) -> int:
    """How many slots of a state a step reads; further ones, without tokens, would change no bit.

    In a growing state they are a multiple of `USED_SLOTS` where the host knows the positions. A
    soft cap needs all: without PyTorch's kernel their number changes the last bits.
    """
    found = places(segment_pos)
    if mixer.reach is not None or mixer.soft_cap or not found:
        return slots
    return min(slots, -(-(max(found) + 1) // USED_SLOTS) * USED_SLOTS)


def known_rows(mixer: Attention, segment_pos: Positions, cache: AttentionBlockCache) -> Rows | None:
    """The rows of a step, where the host knows them.

    None elsewhere, where a document begins, and where the state has no room or more tokens than
    the document.
    """
    found = places(segment_pos)
    if not found or 0 in found or not is_known(cache.num_tokens):
        return None
    rows = Rows(found, tuple(cache.num_tokens.tolist()))
    if _TERMS.get().reproducible and len(found) > 1:
        return None
    if any(0 <= place < held for place, held in zip(*rows, strict=True)):
        return None
    return rows if mixer.reach is not None or max(found) < cache.keys.shape[1] else None


def step_at(
    mixer: Attention,
    q_b1nh: Float[Tensor, "b 1 n h"],
    k_b1kh: Float[Tensor, "b 1 kv h"],
    v_b1kh: Float[Tensor, "b 1 kv h"],
    rows: Rows,
    cache: AttentionBlockCache,
) -> tuple[Float[Tensor, "b 1 n h"], AttentionBlockCache]:
    """The step of such rows: it copies no state inside `giving_up`."""
    slots, last = cache.keys.shape[1], max(rows.places)
    pairs = ((cache.keys, k_b1kh), (cache.values, v_b1kh))
    if last < slots:  # the slot of a token holds nothing
        rings = [_with_tokens(*pair, rows.places) for pair in pairs]
        keys, values = (ring[:, : max(last, 0) + 1] for ring in rings)
        sees_bs = _sees(rows, slots)
        mask = None if sees_bs is None else sees_bs[:, None]
        encoded = attend_masked(q_b1nh, keys, values, mask, mixer)
    else:  # a token may still see what it replaces
        encoded = attend_also(q_b1nh, *pairs[0], *pairs[1], mixer, _sees_in_ring(rows, slots))
        rings = [_with_tokens(*pair, rows.places) for pair in pairs]
    added = number(1, cache.num_tokens) if min(rows.places) > 0 else _are_tokens(rows.places)
    return encoded, AttentionBlockCache(rings[0], rings[1], cache.num_tokens + added)


def ages(segment_pos: Positions, used: int, slots: int) -> Int[Tensor, "b s"]:
    """How many tokens came after the one in each slot; slots - 1 in the new token's own slot."""
    return (segment_pos - torch.arange(used, device=segment_pos.device) - 1) % slots


@functools.lru_cache(maxsize=8)
def _sees(rows: Rows, slots: int) -> Bool[Tensor, "b s"] | None:
    """The slots up to the last token that each row sees; None if these are all."""
    if all(held >= place == rows.places[0] for place, held in zip(*rows, strict=True)):
        return None
    place, held = (torch.tensor(z, device="cpu")[:, None] for z in rows)
    # Padding sees one slot, whatever it holds: else nothing is defined.
    age = ages(place.clamp(min=0), max(rows.places) + 1, slots)
    return (age < held) | (age == slots - 1)


@functools.lru_cache(maxsize=8)
def _sees_in_ring(rows: Rows, slots: int) -> Bool[Tensor, "b s"] | None:
    """The slots of a ring that each row sees before its token is in it; None if these are all."""
    if min(rows.held) >= slots:
        return None
    place, held = (torch.tensor(z, device="cpu")[:, None] for z in rows)
    return ages(place, slots, slots) < held


@functools.lru_cache(maxsize=8)
def _are_tokens(found: tuple[int, ...]) -> Bool[Tensor, " b"]:
    return torch.tensor(found, device="cpu") >= 0


@functools.lru_cache(maxsize=8)
def _index(found: tuple[int, ...], slots: int) -> tuple[Tensor, Tensor]:
    """The rows that have a token, and its slot in each."""
    pairs = [(row, place % slots) for row, place in enumerate(found) if place >= 0]
    row, slot = torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    return row, slot


def _with_tokens(
    ring_bskh: Float[Tensor, "b s kv h"],
    new_b1kh: Float[Tensor, "b 1 kv h"],
    found: tuple[int, ...],
) -> Float[Tensor, "b s kv h"]:
    """The ring with each row's token in its slot."""
    ring_bskh = ring_bskh.to(new_b1kh.dtype)
    ring_bskh = ring_bskh if is_given_up() else ring_bskh.clone()
    slots = ring_bskh.shape[1]
    if len({*found}) == 1 and found[0] > 0:
        ring_bskh[:, found[0] % slots] = new_b1kh[:, 0]
        return ring_bskh
    row, slot = _index(found, slots)
    return ring_bskh.index_put_((row, slot), new_b1kh[row, 0])
