"""Timing of contenders against each other: each in its own process, in turns.

A worker is a script that calls `serve` with its tasks. Only one runs at a time, and every round
runs each task once, so that a slow minute of the machine affects all equally.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Task = Callable[[], Any]
Seconds = dict[str, dict[str, list[float]]]
TURN = 0.05  # seconds for which a short task repeats
ANSWERS = "WORKER_ANSWERS"  # the variable that names the file descriptor for a worker's answers
# Settings that change the speed and are not in the command.
ENVIRONMENT = ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "XLA_FLAGS")
# Instruction sets that decide how fast products are.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton", "transformers", "numpy", "xllamacpp")


def serve(tasks: Mapping[str, Task]) -> None:
    """Runs the tasks that standard input names, one line `{"task": name, "turn": bool}` each.

    Answers with the seconds of one call or, for a turn, with the median of repeated calls over
    `TURN` seconds. An uncounted call before them wakes threads and fills caches. A task that
    returns a float measures itself: those are its seconds.
    """

    def timed(call: Task) -> float:
        start = time.perf_counter()
        result = call()
        return result if isinstance(result, float) else time.perf_counter() - start

    with open(int(os.environ[ANSWERS]), "w") as answers:
        print(json.dumps(sorted(tasks)), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            task = tasks[request["task"]]
            calls = [timed(task)]
            if request["turn"]:
                end = time.perf_counter() + TURN  # by the clock: a task may return any float
                calls = [timed(task)]
                while time.perf_counter() < end:
                    calls.append(timed(task))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = {"seconds": statistics.median(calls), "peak_bytes": peak}
            print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A contender's process."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        answers, to_answer = os.pipe()  # libraries print to stdout, Gloo for one
        environment[ANSWERS] = str(to_answer)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            text=True,
            env={**os.environ, **environment},
            pass_fds=[to_answer],
        )
        os.close(to_answer)
        self._answers = os.fdopen(answers)
        self.peak_bytes = 0
        self.tasks: list[str] = self._answer()

    def run(self, task: str, turn: bool = False) -> float:
        """Seconds of one call, or of the median call of a turn (see `serve`)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, "turn": turn}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._answers.close()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{shlex.join(map(str, self._process.args))} ended early")  # pyright: ignore[reportArgumentType]
        return json.loads(line)


def measure(workers: Mapping[str, Worker], rounds: int) -> tuple[Seconds, Seconds]:
    """Seconds by contender and task: first calls, and `rounds` turns (see `serve`)."""
    tasks = sorted({task for worker in workers.values() for task in worker.tasks})
    turns = [(name, task) for task in tasks for name in workers if task in workers[name].tasks]
    first: Seconds = {name: {} for name in workers}
    later: Seconds = {name: {} for name in workers}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=len(turns) * (rounds + 1))
        for name, task in turns:
            first[name][task] = [workers[name].run(task)]
            progress.advance(bar)
        for _ in range(rounds):
            for name, task in turns:
                later[name].setdefault(task, []).append(workers[name].run(task, turn=True))
                progress.advance(bar)
    return first, later


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles in milliseconds; or the only one."""
    if len(seconds) == 1:
        return f"{seconds[0] * 1e3:.3g}"
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle * 1e3:.3g} ({low * 1e3:.3g} to {high * 1e3:.3g})"


def about() -> dict[str, Any]:
    """Machine, versions and command."""
    model, flags = platform.processor() or platform.machine(), list[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        model = fields.get("model name", model)
        flags = [flag for flag in fields.get("flags", "").split() if flag in INSTRUCTIONS]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "cpu": f"{model}, {len(os.sched_getaffinity(0))} cores, {' '.join(flags)}",
        "python": platform.python_version(),
        "versions": versions,
    }


def publish(table: Table, results: Mapping[str, Any], output: Path | None) -> None:
    """Prints a table and writes it and the results to `output`, a name without suffix."""
    Console(width=140).print(table)
    if output is None:
        return
    everything = {**about(), **results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    with output.with_suffix(".txt").open("w") as file:
        for key, value in about().items():
            print(f"{key}: {value}", file=file)
        Console(width=140, file=file).print(table)
