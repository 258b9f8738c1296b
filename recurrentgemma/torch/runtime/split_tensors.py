"""Tensors of which each process of a mesh keeps a part: made, put together, measured."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from recurrentgemma.torch.scan.gates import wide_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def part_of(tensor: Tensor, place: Tensor) -> Tensor:
    """This process's part of a tensor, which every process has or has a part of.

    It is split like `place` along the axes that have the same size; the tensor itself if that is
    not split.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(place, DTensor):
        return tensor
    mesh, placements = place.device_mesh, inherited(place, tensor.shape)
    if isinstance(tensor, DTensor):
        return tensor.redistribute(mesh, placements)
    part = tensor[_slices(tensor.shape, mesh, placements)]
    part = part.clone(memory_format=torch.contiguous_format)  # without the memory of the whole
    return _split_tensor(part, tensor.shape, mesh, placements)


def inherited(place: DTensor, shape: Sequence[int]) -> list[Placement]:
    """How a moment of a split parameter is split: as that is, along axes of the same size."""
    from torch.distributed.tensor import Replicate

    dims = [getattr(placement, "dim", None) for placement in place.placements]
    return [
        p if dim is None or shape[dim] == place.shape[dim] else Replicate()
        for p, dim in zip(place.placements, dims, strict=True)
    ]


def zeros(place: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros for a moment of a parameter, split as it is; see `part_of`."""
    if mesh_of([place]) is None:
        return place.new_zeros(shape)
    split: Any = place
    mesh, placements = split.device_mesh, inherited(split, shape)
    sizes = [part.stop - part.start for part in _slices(shape, mesh, placements)]
    return _split_tensor(split.to_local().new_zeros(sizes), shape, mesh, placements)


def local_slices(place: DTensor) -> tuple[slice, ...]:
    """Which part of a tensor this process has."""
    return _slices(place.shape, place.device_mesh, place.placements)


def placed(local: Tensor, place: DTensor) -> DTensor:
    """The split tensor of which this process has a part, split like `place`."""
    return _split_tensor(local, place.shape, place.device_mesh, place.placements)


def _slices(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[slice, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(tuple(shape), mesh, placements)
    return tuple(slice(i, i + size) for i, size in zip(offsets, sizes, strict=True))


def _split_tensor(
    local: Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> DTensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    local = local.to(mesh.device_type).contiguous()
    how: dict[str, Any] = {"run_check": False, "shape": torch.Size(shape), "stride": stride}
    return DTensor.from_local(local, mesh, placements, **how)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh of the first split tensor; None if no tensor is split."""
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. If processes hold parts of it, all must call this together."""
    if mesh_of([tensor]) is None:
        return tensor
    split: Any = tensor
    with _without_advice():
        return split.full_tensor()


def moved(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """A tensor that is split in another way."""
    with _without_advice():
        return tensor.redistribute(placements=placements)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Drops PyTorch's advice to flatten a mesh, along which FSDP and "tensor" split in turn."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    logger.addFilter(_is_no_advice)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "sequential" not in record.getMessage()


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all values of tensors; all processes that hold parts must call this together."""
    norms, mesh = [], mesh_of(tensors)
    for tensor in tensors:
        split: Any = tensor
        local = tensor if mesh is None else split.to_local()
        norm = torch.linalg.vector_norm(local, dtype=wide_dtype(tensor.dtype))
        if mesh is not None:
            sizes = zip(mesh.shape, split.placements, strict=True)
            norm = norm / math.prod(n for n, p in sizes if p.is_replicate()) ** 0.5
        norms.append(norm)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if mesh is None:
        return norm
    square = norm.square()
    for group in mesh.get_all_groups():
        dist.all_reduce(square, group=group)
    return square.sqrt()
