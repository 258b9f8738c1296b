"""A model split over the processes of a mesh, with FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from recurrentgemma.torch.model import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_NEEDED = "2.10"  # before it, a part keeps the memory of the whole, or FSDP fails on a CPU


def shard(model: Model, mesh: DeviceMesh) -> None:
    """Splits a model block by block, also on the meta device.

    Raises:
      RuntimeError: This version of PyTorch cannot split a model.
    """
    if TorchVersion(torch.__version__) < _NEEDED:
        raise RuntimeError(
            f"a model is split with PyTorch {_NEEDED} or newer, got {torch.__version__}"
        )
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def part_of(tensor: Tensor, place: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, split like `place`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(place, DTensor)
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh of the first split tensor; None if no tensor is split."""
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. If processes hold parts of it, all must call this together."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
    return tensor


def by_the_first(
    mesh: DeviceMesh, tensors: Iterable[Tensor], write: Callable[[Iterable[Tensor]], None]
) -> None:
    """Lets the first process of a mesh write split tensors; all processes must call this together.

    Args:
      mesh: The processes.
      tensors: The tensors to write, in the same order in every process.
      write: Takes whole tensors, one at a time, and writes them; it runs in the first process.

    Raises:
      RuntimeError: The first process could not write; there, the error of `write` is raised.
    """
    pieces = map(whole, tensors)
    error: BaseException | None = None
    if not any(mesh.get_coordinate() or (1,)):
        try:
            write(pieces)
        except BaseException as raised:  # also Ctrl-C: the others wait for the remaining tensors
            error = raised
    for _ in pieces:
        pass
    answer = [None if error is None else f"{type(error).__name__}: {error}"]
    for group in mesh.get_all_groups():
        dist.broadcast_object_list(answer, dist.get_global_rank(group, 0), group)
    if error is not None:
        raise error
    if answer[0] is not None:
        raise RuntimeError(f"the first process of the mesh failed: {answer[0]}")
