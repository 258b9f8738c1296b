"""A training step split over two processes, against the same step in one process.

    python benchmarks/data_parallel.py --output benchmarks/results/NAME

A process has a core and a thread of its own. The two processes of "data=2" take half of the rows
each; their gradients meet over loopback. The model is the one of `model.py`, 23M parameters in
float32, with AdamW and without recomputation. It needs two free cores.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from interleaved import Task, Worker, measure, publish, serve, spread
from model import PATTERN, SHAPE, batch

FRAMEWORKS = ("jax", "torch")
WAYS = ("one process", "data=2")
RATE = 1e-3


def training_step(framework: str, shape: tuple[int, int], index: int, coordinator: str) -> Task:
    """A step of one process, on its rows; alone if no coordinator is named."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[index : index + 1])  # before a framework counts its threads
    ours = importlib.import_module(f"recurrentgemma.{framework}")
    count, mesh = 2 if coordinator else 1, None
    if coordinator:
        meeting = importlib.import_module(f"recurrentgemma.{framework}.runtime.processes")
        meeting.join(coordinator, count, index)
        mesh = ours.make_mesh("data=2")
    block_types = tuple(ours.TemporalBlockType[name] for name in PATTERN)
    config = ours.GriffinConfig(**SHAPE, block_types=block_types)
    options = ours.OptimizerOptions(learning_rate=RATE)
    if framework == "jax":
        model, params = ours.Griffin(config, mesh=mesh), ours.init_params(config, 0, mesh=mesh)
        state = ours.create_train_state(model, params, optimizer=options)
    else:
        import torch

        torch.manual_seed(0)
        model = ours.Griffin(config, dtype=torch.float32, mesh=mesh)
        state = ours.create_train_state(model, optimizer=options)
    rows = shape[0] // count
    tokens, places = (part[index * rows : (index + 1) * rows] for part in batch(shape))
    weights = np.ones(tokens.shape, np.float32)
    given = ours.Batch(tokens, places, np.roll(tokens, -1, axis=1), weights)

    def step() -> None:
        nonlocal state
        state, metrics = ours.train_step(state, given)
        float(metrics["loss"])

    return step


def work(framework: str, way: str, shape: tuple[int, int]) -> None:
    """Serves one contender; of two processes the first starts the second and gives it its turns."""
    if way == WAYS[0]:
        serve({"step": training_step(framework, shape, 0, "")})
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*sys.orig_argv, "--coordinator", coordinator]
    second = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    atexit.register(second.wait)  # runs last: JAX, imported later, ends both processes together
    assert second.stdin is not None
    with second.stdin as turns:
        own = training_step(framework, shape, 0, coordinator)

        def step() -> None:
            print("step", file=turns, flush=True)
            own()

        serve({"step": step})


def main() -> None:
    """Measures one process and two of each framework, and prints the ratio of their times."""
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch, all processes'")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--only", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = arguments.rows, arguments.length
    if arguments.coordinator:
        step = training_step(arguments.worker[0], shape, 1, arguments.coordinator)
        for _ in sys.stdin:
            step()
        return
    if arguments.worker:
        framework, way = arguments.worker
        work(framework, way, shape)
        return
    size = ["--rows", str(arguments.rows), "--length", str(arguments.length)]
    workers = {
        f"{framework}, {way}": Worker(
            [sys.executable, __file__, *size, "--worker", framework, way], OMP_NUM_THREADS="1"
        )
        for framework in arguments.only
        for way in WAYS
    }
    _, seconds = measure(workers, arguments.rounds)
    for worker in workers.values():
        worker.close()
    table = Table("", "step, ms", "of one process")
    ratios = {}
    for name, tasks in seconds.items():
        alone = seconds[f"{name.partition(',')[0]}, {WAYS[0]}"]["step"]
        ratios[name] = statistics.median(tasks["step"]) / statistics.median(alone)
        table.add_row(name, spread(tasks["step"]), f"{ratios[name]:.2f} x")
    publish(table, {"shape": shape, "seconds": seconds, "ratios": ratios}, arguments.output)


if __name__ == "__main__":
    main()
