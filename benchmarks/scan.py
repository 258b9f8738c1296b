"""Speed of the linear recurrence and of the fused RG-LRU: every implementation beside its peers.

    python benchmarks/scan.py --output benchmarks/results/NAME
    python benchmarks/scan.py --device gpu --dtype bfloat16 --shapes 8x4096x2560 1x8192x2560

The script first compares each output with the definition in float64. Then contenders run in turns,
forward and backward, each framework in its own process. On the CPU the floor is a loop in C with
OpenMP that writes to new memory ("C") or to the same memory again ("C, same output"). On a GPU the
scans of flash-linear-attention and accelerated-scan take part if they are installed, and the floor
is the time to move the necessary bytes at the rate of a copy in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Task, Worker, measure, publish, serve, spread

Shape = tuple[int, int, int]
Tasks = dict[str, Task]
SHAPES = {
    "cpu": ["1x1024x2560", "4x512x1024", "1x8192x1024"],
    "gpu": ["8x4096x2560", "32x2048x2560", "1x8192x2560"],
}
IMPLEMENTATIONS = {
    ("jax", "cpu"): ["xla", "associative"],
    ("jax", "gpu"): ["pallas", "xla", "associative"],
    ("torch", "cpu"): ["native"],
    ("torch", "gpu"): ["triton", "native"],
}
# How many [B, T, D] arrays each pass must read or write.
PASSES = {
    "copy": 2,
    "scan forward": 3,
    "scan backward": 5,
    "fused forward": 4,
    "fused backward": 8,
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # times the largest value


def inputs(operation: str, shape: Shape) -> list[np.ndarray]:
    """x and a of a scan; x, both gates' pre-activations and a_param of an RG-LRU."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    if operation == "scan":
        return [x, rng.uniform(0.5, 0.999, shape).astype(np.float32)]
    gates = [rng.standard_normal(shape, np.float32) for _ in range(2)]
    return [x, *gates, rng.uniform(-6, -3, shape[2]).astype(np.float32)]


def expected(operation: str, arrays: list[np.ndarray]) -> np.ndarray:
    """The outputs in float64, with one document from the first step on."""
    x, *others = (array.astype(np.float64) for array in arrays)
    if operation == "scan":
        a = others[0]
    else:
        input_gate, a_gate, a_param = others
        log_a = -8 * np.log1p(np.exp(a_param)) / (1 + np.exp(-a_gate))
        multiplier = np.sqrt(-np.expm1(2 * log_a))
        multiplier[:, 0] = 1
        a, x = np.exp(log_a), x * multiplier / (1 + np.exp(-input_gate))
    h, y = np.zeros_like(x[:, 0]), np.empty_like(x)
    for t in range(x.shape[1]):
        h = y[:, t] = a[:, t] * h + x[:, t]
    return y


def check(name: str, outputs: np.ndarray, truth: np.ndarray, dtype: str) -> None:
    """Raises if an output is wrong: correctness comes before speed."""
    error = np.abs(outputs - truth).max() / np.abs(truth).max()
    if not error < TOLERANCE[dtype]:
        raise AssertionError(f"{name} is off by {error:.2g} of the largest value")


def jax_tasks(shape: Shape, dtype: str, device: str) -> Tasks:
    """Implementations in JAX and, as peers, `lax.associative_scan` and `lax.scan`."""
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import scan

    def associative(x, a):
        def combine(one, two):
            return one[0] * two[0], one[1] * two[0] + two[1]

        return jax.lax.associative_scan(combine, (a, x), axis=1)[1]

    def sequential(x, a):
        def step(h, inputs):
            h = inputs[0] * h + inputs[1]
            return h, h

        over_time = (a.swapaxes(0, 1), x.swapaxes(0, 1))
        return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), over_time)[1].swapaxes(0, 1)

    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape[:2])
    functions: dict[tuple[str, str], Callable] = {
        ("scan", "lax.associative_scan"): associative,
        ("scan", "lax.scan"): sequential,
    }
    for name in IMPLEMENTATIONS["jax", device]:
        functions["scan", f"jax {name}"] = lambda x, a, name=name: scan.linear_scan(
            x, a, implementation=name
        )[0]
        functions["fused", f"jax {name}"] = lambda *arrays, name=name: scan.rg_lru_scan(
            *arrays, segment_pos=positions, implementation=name
        )[0]
    tasks: Tasks = {}
    for (operation, name), function in functions.items():
        arrays = inputs(operation, shape)
        args = [jnp.asarray(array, dtype if array.ndim > 1 else None) for array in arrays]
        forward = jax.jit(function)
        outputs, pull = jax.jit(lambda *args, f=function: jax.vjp(f, *args))(*args)
        backward = jax.jit(lambda pull, dy: pull(dy))
        rounded = [np.asarray(arg, np.float32) for arg in args]
        check(name, np.asarray(outputs, np.float64), expected(operation, rounded), dtype)
        for key, call in {
            f"{operation} forward|{name}": lambda f=forward, args=args: f(*args),
            f"{operation} backward|{name}": lambda f=backward, p=pull, y=outputs: f(p, y),
        }.items():
            tasks[key] = lambda call=call: jax.block_until_ready(call())
    return tasks


def torch_tasks(shape: Shape, dtype: str, device: str) -> Tasks:
    """Implementations in torch and, as peers, a loop over time and other packages' kernels."""
    import torch

    from recurrentgemma.torch import scan

    place = "cuda" if device == "gpu" else device

    def loop(x, a):
        return scan.linear_scan(x, a, implementation="reference")[0]

    functions: dict[tuple[str, str], Callable] = {("scan", "torch loop"): loop}
    if device == "gpu" and importlib.util.find_spec("fla"):
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn  # pyright: ignore[reportMissingImports]

        functions["scan", "fla chunk_hgrn"] = lambda x, a: chunk_hgrn(x, a.log())[0]
        functions["scan", "fla fused_recurrent_hgrn"] = lambda x, a: fused_recurrent_hgrn(
            x, a.log()
        )[0]
    if device == "gpu" and importlib.util.find_spec("accelerated_scan"):
        from accelerated_scan.warp import scan as warp_scan  # pyright: ignore[reportMissingImports]

        functions["scan", "accelerated-scan"] = lambda x, a: (
            warp_scan(a.mT.contiguous(), x.mT.contiguous()).mT
        )
    positions = torch.arange(shape[1], device=place).expand(shape[:2])
    for name in IMPLEMENTATIONS["torch", device]:
        functions["scan", f"torch {name}"] = lambda x, a, name=name: scan.linear_scan(
            x, a, implementation=name
        )[0]
        functions["fused", f"torch {name}"] = lambda *arrays, name=name: scan.rg_lru_scan(
            *arrays, segment_pos=positions, implementation=name
        )[0]

    def wait():
        if place == "cuda":
            torch.cuda.synchronize()

    tasks: Tasks = {}

    def add(key: str, call: Task) -> None:
        def task():
            call()
            wait()

        tasks[key] = task

    source = torch.randn(shape, device=place, dtype=getattr(torch, dtype))
    target = torch.empty_like(source)
    add("copy|torch copy", lambda: target.copy_(source))
    for (operation, name), function in functions.items():
        arrays = [torch.from_numpy(array).to(place) for array in inputs(operation, shape)]
        args = [z.to(getattr(torch, dtype)) if z.ndim > 1 else z for z in arrays]
        rounded = [arg.float().cpu().numpy() for arg in args]
        leaves = [arg.clone().requires_grad_() for arg in args]
        outputs = function(*leaves)
        check(name, outputs.detach().double().cpu().numpy(), expected(operation, rounded), dtype)
        add(
            f"{operation} forward|{name}",
            torch.no_grad()(lambda f=function, args=args: f(*args)),
        )
        if name == "torch loop":
            continue  # its backward pass takes minutes
        add(
            f"{operation} backward|{name}",
            lambda y=outputs, leaves=leaves: torch.autograd.grad(
                y, leaves, y.detach(), retain_graph=True
            ),
        )
    return tasks


def c_tasks(shape: Shape, dtype: str, device: str) -> Tasks:
    """The floor on the CPU: `floor.c`, if there is a C compiler."""
    del device
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", library, Path(__file__).with_name("floor.c")], check=True)
        floor = ctypes.CDLL(str(library))

    def call(function: Any, *arrays: np.ndarray) -> None:
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
        function(*pointers, *map(ctypes.c_long, shape))

    x, a = inputs("scan", shape)
    y, dx, da = (np.zeros_like(x) for _ in range(3))
    call(floor.forward, x, a, y)
    check("C", y.astype(np.float64), expected("scan", [x, a]), dtype)
    return {
        "scan forward|C": lambda: call(floor.forward, x, a, np.empty_like(x)),
        "scan forward|C, same output": lambda: call(floor.forward, x, a, y),
        "scan backward|C": lambda: call(
            floor.backward, x, a, y, np.empty_like(x), np.empty_like(x)
        ),
        "scan backward|C, same output": lambda: call(floor.backward, x, a, y, dx, da),
    }


BUILDERS = {"C": c_tasks, "jax": jax_tasks, "torch": torch_tasks}


def rows(shape: Shape, itemsize: int, seconds: dict[str, list[float]]) -> Iterator[list[str]]:
    """The rows of a table: pass, implementation, time, rate, and the time relative to the floor."""
    size = int(np.prod(shape)) * itemsize
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for key in sorted(seconds, key=lambda key: (key.partition("|")[0], medians[key])):
        task, _, name = key.partition("|")
        rate = PASSES[task] * size / medians[key]
        floor = medians.get(f"{task}|C", PASSES[task] / PASSES["copy"] * medians["copy|torch copy"])
        yield [
            "x".join(map(str, shape)),
            task,
            name,
            spread(seconds[key]),
            f"{rate / 1e9:.1f}",
            f"{medians[key] / floor:.2f}",
        ]


def main() -> None:
    """Measures every implementation on every shape."""
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--shapes", nargs="+", metavar="BxTxD")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", choices=BUILDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = arguments.shapes or SHAPES[arguments.device]
    if arguments.worker:
        (text,) = shapes
        batch, length, width = map(int, text.split("x"))
        build = BUILDERS[arguments.worker]
        serve(build((batch, length, width), arguments.dtype, arguments.device))
        return
    builders = [name for name in BUILDERS if arguments.device == "cpu" or name != "C"]
    if arguments.dtype != "float32":
        builders.remove("C")
    table = Table("shape", "pass", "implementation", "ms, median (quartiles)", "GB/s", "of floor")
    results: dict[str, Any] = {}
    for text in shapes:
        options = ["--device", arguments.device, "--dtype", arguments.dtype, "--shapes", text]
        workers = {
            # The frameworks get ordinary memory; NumPy would ask for huge pages.
            name: Worker(
                [sys.executable, __file__, "--worker", name, *options], NUMPY_MADVISE_HUGEPAGE="0"
            )
            for name in builders
        }
        _, later = measure(workers, arguments.rounds)
        for worker in workers.values():
            worker.close()
        results[text] = {key: value for worker in later.values() for key, value in worker.items()}
        batch, length, width = map(int, text.split("x"))
        itemsize = {"float32": 4, "bfloat16": 2}[arguments.dtype]
        for row in rows((batch, length, width), itemsize, results[text]):
            table.add_row(*row)
        table.add_section()
    publish(table, {"seconds": results}, arguments.output)


if __name__ == "__main__":
    main()
