"""Values that the host knows, with which a step of decoding takes fewer operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from recurrentgemma.torch.scan import forward_levels

_R = TypeVar("_R")


def has_values(values: Tensor) -> bool:
    """Whether a tensor holds values: it is not fake, traced, captured or under a transform."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if type(values) is not Tensor or values.is_meta or traced:
        return False
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing())


def is_known(values: Tensor) -> bool:
    """Whether values can be read here without waiting for a device."""
    return values.device.type == "cpu" and has_values(values)


def is_plain_step(segment_pos: Int[Tensor, "b t"]) -> bool:
    """Whether this is a step at positions that the host knows, and no derivative is asked for."""
    return (
        segment_pos.shape[1] == 1
        and not torch.is_grad_enabled()
        and not forward_levels()
        and is_known(segment_pos)
    )


def inside_documents(segment_pos: Int[Tensor, "b t"]) -> bool:
    """Whether this is a plain step without a start of a document or padding."""
    return is_plain_step(segment_pos) and min(segment_pos[:, 0].tolist(), default=0) > 0


def once_a_step(function: Callable[..., _R], segment_pos: Int[Tensor, "b t"], *args: object) -> _R:
    """`function(segment_pos, *args)`, which is kept for the other layers of a plain step."""
    if is_plain_step(segment_pos):
        return _at(function, tuple(segment_pos[:, 0].tolist()), *args)
    return function(segment_pos, *args)


@functools.lru_cache(maxsize=8)
def _at(function: Callable[..., _R], positions: tuple[int, ...], *args: object) -> _R:
    return function(torch.tensor(positions, dtype=torch.int64, device="cpu")[:, None], *args)
