"""The processes of a run: they meet, tell each other what they have, and write together."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.processes import ALONE, Processes
from recurrentgemma.jax.sharding import compile_anew_on_cpu, on_host, row_parts

_FOUND_BY_JAX = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Joins the other processes of a run; it must come before JAX is used.

    Nothing happens where this process has joined already, or is alone.

    Args:
      coordinator: HOST:PORT of the first process; if None what SLURM, Open MPI or a Cloud TPU says,
        and a process alone without them.
      processes: How many processes there are.
      process_id: Which one this is, from 0.
      timeout: Seconds to wait for the others.

    Raises:
      ValueError: The number of this process is missing or no number of a process, or the others do
        not come in time; the message has the address.
    """
    if jax.distributed.is_initialized():
        return
    given = (coordinator, processes, process_id)
    if given == (None, None, None):
        counts = [os.environ.get(name, "") for name in _FOUND_BY_JAX]
        if any(count not in ("", "1", "localhost") for count in counts):
            jax.distributed.initialize(initialization_timeout=int(timeout))
            compile_anew_on_cpu(jax.default_backend())
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            "a run of several processes needs the coordinator's HOST:PORT, the number of processes "
            f"and the number of this one, got {coordinator=} {processes=} {process_id=}"
        )
    if not 0 <= process_id < processes:
        raise UserError(
            f"the number of a process must be from 0 to {processes - 1}, got {process_id}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"the coordinator must be HOST:PORT, got {coordinator!r}")
    who = f"process {process_id} of {processes}"
    if process_id > 0:
        _reach(who, coordinator, (host.strip("[]"), int(port)), timeout)
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, initialization_timeout=int(timeout)
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{who} did not meet the others at {coordinator}: {reason}") from error
    compile_anew_on_cpu(jax.default_backend())


def _reach(who: str, coordinator: str, address: tuple[str, int], timeout: float) -> None:
    """Waits until the first process listens; where it does not, JAX would abort this process."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(address, timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"{who} did not reach the coordinator at {coordinator} in {timeout:g} s: "
                    f"{error.strerror or error}"
                ) from error
            time.sleep(0.2)


class MeshProcesses(Processes):
    """The processes of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.index, self.count = jax.process_index(), jax.process_count()

    @property
    def row_parts(self) -> tuple[list[int], int]:
        return row_parts(self._mesh)

    def everyone(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = process_allgather(np.asarray(len(data), np.int32))
        padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few shapes to compile
        padded[: len(data)] = data
        rows = process_allgather(padded)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def lost(self, error: Exception) -> str | None:
        words = str(error)
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "loo" in words  # Gloo's errors
        return words.strip().splitlines()[0] if lost else None


def processes_of(mesh: Mesh | None) -> Processes:
    """The processes of a mesh; a process alone if None."""
    return ALONE if mesh is None else MeshProcesses(mesh)


def by_the_first(arrays: Iterable[Any], write: Callable[[Iterable[np.ndarray]], None]) -> None:
    """Lets the first process write arrays that processes hold parts of; all must call it together.

    Args:
      arrays: The arrays to write, in the same order in every process.
      write: Takes whole arrays, one at a time, and writes them; it runs in the first process, or in
        a process that holds all of them itself.

    Raises:
      OtherProcessError: The first process could not write; there, the error of `write` is raised.
    """
    arrays = list(arrays)
    mesh = next((a.sharding.mesh for a in arrays if _is_shared(a)), None)
    processes, pieces = processes_of(mesh), map(on_host, arrays)
    error: BaseException | None = None
    if processes.is_first:
        try:
            write(pieces)
        except BaseException as raised:  # also Ctrl-C: the others wait for the remaining arrays
            error = raised
    if mesh is not None:
        for _ in pieces:
            pass
    processes.agree(error)


def _is_shared(array: Any) -> bool:
    return isinstance(array, Array) and not array.is_fully_addressable
