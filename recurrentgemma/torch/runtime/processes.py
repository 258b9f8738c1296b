"""The processes of a mesh: they meet, tell each other what they have, and write together."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.processes import Processes
from recurrentgemma.common.sharding import BATCH_AXES
from recurrentgemma.torch.runtime.split_tensors import whole
from recurrentgemma.torch.runtime.teams import AXIS, TIME

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Where launchers say how many processes there are, which one this is, and its number on its node.
_NUMBERS = {
    "processes": ("WORLD_SIZE", "SLURM_NTASKS"),
    "process_id": ("RANK", "SLURM_PROCID"),
    "local_id": ("LOCAL_RANK", "SLURM_LOCALID"),
}


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Joins the other processes of a run; nothing happens where this process has joined already.

    Args:
      coordinator: HOST:PORT of the first process; MASTER_ADDR and MASTER_PORT, which `torchrun`
        sets, if None.
      processes: How many processes there are; what `torchrun` or `srun` says if None, or else 1.
      process_id: Which one this is, from 0; what they say if None.
      timeout: Seconds to wait for the others.

    Raises:
      ValueError: The number of this process is missing or no number of a process, or the others do
        not come in time; the message has the address.
    """
    if dist.is_initialized():
        return
    count = _number("processes", processes, 1)
    index = _number("process_id", process_id, 0 if count == 1 else None)
    if not 0 <= index < count:
        raise UserError(f"the number of a process must be from 0 to {count - 1}, got {index}")
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("local_id", None, 0) % torch.cuda.device_count())
    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = datetime.timedelta(seconds=timeout)
    if coordinator is None and "MASTER_ADDR" in os.environ:
        coordinator = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    if coordinator is None and count > 1:
        raise UserError(
            f"{count} processes need the address of the first: start them with torchrun, or give "
            "its HOST:PORT"
        )
    try:
        if coordinator is None:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(kinds, store=store, rank=0, world_size=1)
        elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun keeps the store itself
            dist.init_process_group(kinds, timeout=wait)
        else:
            address = f"tcp://{coordinator}"
            dist.init_process_group(kinds, address, wait, world_size=count, rank=index)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"process {index} of {count} did not meet the others at {coordinator}: {reason}"
        ) from error


def _number(name: str, given: int | None, default: int | None) -> int:
    found = [os.environ[variable] for variable in _NUMBERS[name] if variable in os.environ]
    if given is not None or found:
        return int(found[0] if given is None else given)
    if default is None:
        raise UserError(
            f"the number of this process is missing: start it with torchrun, or set "
            f"{_NUMBERS[name][0]}"
        )
    return default


def gathered(values: Iterable[SupportsFloat], mesh: DeviceMesh | None) -> list[list[float]]:
    """The numbers of every process of a mesh, in the order of the processes.

    All must call this together, with the same count of numbers.
    """
    own = list(map(float, values))
    if mesh is None:
        return [own]
    rows = torch.tensor([own], dtype=torch.float64, device=mesh.device_type)
    for group in reversed(mesh.get_all_groups()):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows, group)
        rows = torch.cat(parts)
    return rows.tolist()


def summed(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sum of a tensor over the tokens of a mesh; all must call this together."""
    if mesh is None:
        return tensor
    total = tensor.clone()
    for name, group in zip(names_of(mesh), mesh.get_all_groups(), strict=True):
        if name != AXIS:
            dist.all_reduce(total, group=group)
    return total


def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
    """The axes of a mesh; the axis of a mesh without names is "fsdp"."""
    return mesh.mesh_dim_names or ("fsdp",)


def row_parts(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which equal part of a batch's rows this process takes, and how many there are.

    The processes along "tensor" and "sequence" take the same.
    """
    index, parts = 0, 1
    for axis, name in enumerate(() if mesh is None else names_of(mesh)):
        if mesh is not None and name in BATCH_AXES:
            parts *= mesh.size(axis)
            index = index * mesh.size(axis) + mesh.get_local_rank(axis)
    return index, parts


def time_parts(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which equal part of a row's tokens this process takes, and how many there are."""
    if mesh is None or TIME not in names_of(mesh):
        return 0, 1
    return mesh.get_local_rank(TIME), mesh[TIME].size()


class MeshProcesses(Processes):
    """The processes of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self.index, self.count = mesh.get_rank(), mesh.size()

    @property
    def row_parts(self) -> tuple[list[int], int]:
        index, parts = row_parts(self._mesh)
        return [index], parts

    def everyone(self, value: Any) -> list[Any]:
        values = [value]
        for group in reversed(self._mesh.get_all_groups()):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, values, group)
            values = [value for part in parts for value in part]
        return values

    def lost(self, error: Exception) -> str | None:
        words = str(error).strip() or type(error).__name__
        if isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words:
            # Without the place in PyTorch's source, and without advice.
            return re.sub(r"^\[\S+:\d+\] ", "", words.splitlines()[0]).partition(". ")[0]
        return None


def processes_of(mesh: DeviceMesh | None) -> Processes:
    """The processes of a mesh; a process alone if None."""
    return Processes() if mesh is None else MeshProcesses(mesh)


def by_the_first(
    mesh: DeviceMesh | None, tensors: Iterable[Tensor], write: Callable[[Iterable[Tensor]], None]
) -> None:
    """Lets the first process of a mesh write split tensors; all processes must call this together.

    Args:
      mesh: The processes; None for a process alone.
      tensors: The tensors to write, in the same order in every process.
      write: Takes whole tensors, one at a time, and writes them; it runs in the first process.

    Raises:
      OtherProcessError: The first process could not write; there, the error of `write` is raised.
    """
    processes, pieces = processes_of(mesh), map(whole, tensors)
    error: BaseException | None = None
    if processes.is_first:
        try:
            write(pieces)
        except BaseException as raised:  # also Ctrl-C: the others wait for the remaining tensors
            error = raised
    for _ in pieces:
        pass
    processes.agree(error)
