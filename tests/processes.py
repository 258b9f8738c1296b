"""Processes over loopback that tests share: starting one costs three seconds of the processor."""

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import get_context

_SECONDS = 120.0  # that a call may take on a busy machine


class Processes:
    """A group of processes with gloo; a call runs one function in all of them.

    They start at the first call, and again at the first call after one died or raised.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any, deaths: int = 0) -> list[Any]:
        """What a function returns in each process; it must be importable in them.

        Args:
          function: The function.
          args: Its arguments.
          deaths: How many processes die in it; their results are None.
        """
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((function, args))
        answers = [self._answer(process, pipe) for process, pipe in self._running]
        died = sum(answer is None for answer in answers)
        problems = [answer[1] for answer in answers if answer is not None and not answer[0]]
        if died or problems:
            self.stop()
        assert died == deaths, f"{died} processes died"
        assert not problems, "\n".join(problems)
        return [None if answer is None else answer[1] for answer in answers]

    def _answer(self, process: Any, pipe: Any) -> tuple[bool, Any] | None:
        try:
            if pipe.poll(_SECONDS):
                return pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            return None
        return False, "no answer in time"

    def _start(self) -> None:
        context = get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.count):
            pipe, other = context.Pipe()
            args = rank, self.count, store, other
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            other.close()
            self._running.append((process, pipe))

    def stop(self) -> None:
        """Ends the processes."""
        for process, pipe in self._running:
            pipe.close()
            process.kill()
            process.join()
        self._running = []


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, f"process {rank}: {traceback.format_exc()}"
        pipe.send(answer)
