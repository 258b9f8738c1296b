"""A model split over the processes of a mesh, with FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from recurrentgemma.torch.griffin import Griffin

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_NEEDED = "2.10"  # before which parts keep the memory of the whole, or FSDP fails on a CPU


def shard(model: Griffin, mesh: DeviceMesh) -> None:
    """Splits a model, on the meta device too, block by block.

    Raises:
      RuntimeError: This version of PyTorch cannot.
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
    """This process's part of a tensor that all have, split as the `DTensor` it is to replace."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(place, DTensor)
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh that the first split tensor is split over; None if none is."""
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part: then all must call this together."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
    return tensor


def by_the_first(
    mesh: DeviceMesh, tensors: Iterable[Tensor], write: Callable[[Iterable[Tensor]], None]
) -> None:
    """Has the first process of a mesh write what all have parts of; all must call this together.

    Args:
      mesh: The processes.
      tensors: Those to write, in the same order in all.
      write: Takes them whole, one at a time, and writes them; it runs in the first process.

    Raises:
      RuntimeError: The first process could not write; it raises what `write` does.
    """
    pieces = map(whole, tensors)
    error: BaseException | None = None
    if not any(mesh.get_coordinate() or (1,)):
        try:
            write(pieces)
        except BaseException as raised:  # Ctrl-C too: the others wait for what is left
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
