"""Values that the host knows, with which a step of decoding takes fewer operations."""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from recurrentgemma.torch.scan import forward_levels

_R = TypeVar("_R")
# The last result of `read_once` and its values.
_Read = tuple[Callable[[], Any], tuple[int, ...]]
_LAST: contextvars.ContextVar[_Read] = contextvars.ContextVar("last", default=(lambda: None, ()))


def has_values(values: Tensor) -> bool:
    """Whether a tensor holds values: it is not fake, traced, captured or under a transform."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if type(values) is not Tensor or values.is_meta or traced:
        return False
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing())


def is_known(values: Tensor) -> bool:
    """Whether values can be read here without waiting for a device."""
    return values.is_cpu and has_values(values)


def places(segment_pos: Int[Tensor, "b t"]) -> tuple[int, ...] | None:
    """The positions of a step, where the host knows them and no derivative is asked for."""
    if segment_pos.shape[1] != 1 or torch.is_grad_enabled() or forward_levels():
        return None
    if not is_known(segment_pos):
        return None
    tensor, found = _LAST.get()
    return found if tensor() is segment_pos else tuple(segment_pos[:, 0].tolist())


def read_once(segment_pos: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The positions as a tensor that nobody else has, which `places` reads once for all layers."""
    found = places(segment_pos)
    if found is None:
        return segment_pos
    own = segment_pos.detach()
    _LAST.set((weakref.ref(own), found))
    return own


def inside_documents(segment_pos: Int[Tensor, "b t"]) -> bool:
    """Whether this is a step at known places, without a start of a document or padding."""
    found = places(segment_pos)
    return found is not None and min(found, default=0) > 0


def constant(function: Callable[..., _R], like: Tensor, *args: object) -> _R:
    """`function(like.device, *args)`, computed once where `like` is known."""
    return (_kept if is_known(like) else _called)(function, like.device, *args)


def number(value: int | float, like: Tensor) -> Tensor:
    """A number in the dtype of `like`, as a scalar of the CPU, which goes with any device.

    Where Python's number stands, PyTorch makes such a tensor in each operation, and casts it.
    """
    return (_kept if is_known(like) else _called)(_number, value, like.dtype)


def _number(value: int | float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


def _called(function: Callable[..., _R], *args: object) -> _R:
    return function(*args)


@functools.lru_cache(maxsize=32)
def _kept(function: Callable[..., _R], *args: object) -> _R:
    with torch.inference_mode(False):  # else autograd could not use it later
        return function(*args)


def once_a_step(function: Callable[..., _R], segment_pos: Int[Tensor, "b t"], *args: object) -> _R:
    """`function(segment_pos, *args)`, which is kept for the other layers of a step."""
    found = places(segment_pos)
    return function(segment_pos, *args) if found is None else _at(function, found, *args)


@functools.lru_cache(maxsize=8)
def _at(function: Callable[..., _R], positions: tuple[int, ...], *args: object) -> _R:
    return function(torch.tensor(positions, dtype=torch.int64, device="cpu")[:, None], *args)
