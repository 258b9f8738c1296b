"""Decoding with weights in fewer bytes: both twins, every form of the weights, one row and many.

    python benchmarks/quantized.py --size 2b-6 --output benchmarks/results/NAME
    python benchmarks/quantized.py --size 2b --rounds 2 --rows 1 32

A contender is a framework and the form of its weights: a dtype, or a scheme of
`recurrentgemma.common.quantization`, which computes in float32. Weights are random. "2b" is
RecurrentGemma 2B; "2b-6" has its widths, 6 layers and a vocabulary of 32,000; "23m" is the workload
of `benchmarks/model.py`. A step feeds one token to each row and computes its logits, as the sampler
does. It reads the weights once, whatever the number of rows. The share of memory is the rate at
which a step of one row reads them, beside the rate at which memory is read in the same run. The
peak is the largest memory of a contender's process.

Contenders run in turns, each in its own process. Where they do not fit the memory together, each
turn starts the process anew, and JAX finds its compiled programs in a cache. With "2b" a process
takes up to 12 GB (float32), and the line above takes ten minutes on two cores. Bfloat16 and int8
are fast only where the CPU has instructions for them: the results name those that decide.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Seconds, Task, Worker, measure, publish, serve, spread
from model import config_of

ROWS = (1, 8, 32)
FORMS = {"float32": 4.0, "bfloat16": 2.0, "q8": 1.0, "q4": 0.6, "q4_32": 0.8}  # bytes a weight
FRAMEWORKS = ("jax", "torch")
SIZES = ("23m", "2b-6", "2b")
LAYERS, VOCABULARY = 6, 32_000
SHARE = 0.5  # of the memory, for the weights of processes that live side by side
READ = 2**30
PLACE = 300  # the position of a measured token
BLOCK = 1 << 20  # random values; a larger parameter repeats them
BOUND, SIZE, PEAK = "memory", "bytes", "peak_bytes"


def config(size: str) -> Any:
    """The config of a size."""
    from recurrentgemma.common.model import griffin, presets

    if size == "23m":
        return config_of(griffin)
    whole = griffin.GriffinConfig.from_preset(presets.Preset.RECURRENT_GEMMA_2B_V1)
    if size == "2b":
        return whole
    return whole._replace(vocab_size=VOCABULARY, block_types=whole.block_types[:LAYERS])


def values(spec: Any, dtype: str, scheme: str | None = None) -> Any:
    """Random values of a parameter; of a quantised one, random bytes with small scales."""
    from recurrentgemma.common.io.arrays import DTYPES
    from recurrentgemma.common.quantization import Quantized, input_axis, scheme_for, spec_parts

    held = scheme_for(spec, scheme)
    if held is not None:
        some = np.random.default_rng(0).integers(-127, 128, BLOCK, np.int8)
        parts = {
            name: np.full(shape, spec.shape[input_axis(spec)] ** -0.5 / 64, kind)
            if name == ".scale"
            else np.resize(some & 15 if name else some, shape).view(kind).copy()  # of this size
            for name, (shape, kind) in spec_parts(spec, scheme).items()
        }
        arrays = parts[""], parts[".scale"], parts.get(".zero")
        return Quantized(*arrays, held, input_axis(spec), dtype)
    block = spec.init.sample(np.random.default_rng(0), (min(spec.size, BLOCK),))
    return np.resize(block.astype(DTYPES[dtype]), spec.shape)


def decoding(framework: str, form: str, size: str, numbers: list[int]) -> dict[str, Task]:
    """A task for each number of rows, and one that gives the bytes of the weights."""
    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.model.layer_spec import layer_spec
    from recurrentgemma.common.quantization import SCHEMES
    from recurrentgemma.common.twin import find_twin

    made, twin = config(size), find_twin(framework)
    dtype, scheme = ("float32", form) if form in SCHEMES else (form, None)

    parameters = ((spec.path, values(spec, dtype, scheme)) for spec in layer_spec(made))
    engine = twin.sampler(
        twin.make(made, parameters, dtype, decoding=True), load_tokenizer()
    ).engine
    caches: dict[int, Any] = {}

    def step(rows: int) -> float:
        if rows not in caches:
            caches[rows] = engine.begin(rows)
        tokens, places = np.ones(rows, np.int32), np.full(rows, PLACE, np.int32)
        start = time.perf_counter()
        logits, caches[rows] = engine.feed(caches[rows], tokens, places)
        engine.on_host(logits[0, :1])  # waits for the step
        return time.perf_counter() - start

    tasks: dict[str, Task] = {str(rows): functools.partial(step, rows) for rows in numbers}
    return tasks | {SIZE: lambda: float(engine.num_bytes)}


def reading() -> dict[str, Task]:
    """Reads a large array with all cores."""
    import torch

    array = torch.ones(READ // 4)
    return {"1": lambda: torch.dot(array, array)}


def contenders(size: str, only: list[str] | None, numbers: list[int]) -> dict[str, list[str]]:
    """The command of each contender's process."""
    names = [f"{framework} {form}" for framework in FRAMEWORKS for form in FORMS]
    names = [name for name in names if not only or name in only]
    command = [sys.executable, __file__, "--size", size, "--rows", *map(str, numbers)]
    return {name: [*command, "--worker", name] for name in (*names, BOUND)}


def run(commands: dict[str, list[str]], rounds: int, together: bool, cache: str) -> Seconds:
    """Seconds by contender and task; `cache` is a folder for JAX's compiled programs."""
    if together:
        workers = {name: Worker(command) for name, command in commands.items()}
        found = measure(workers, rounds)[1]
        for name, worker in workers.items():
            found[name][PEAK] = [worker.peak_bytes]
            worker.close()
        return found
    found: Seconds = {name: {} for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            worker = Worker(command, JAX_COMPILATION_CACHE_DIR=cache)
            for task, seconds in measure({name: worker}, 1)[1][name].items():
                found[name].setdefault(task, []).extend(seconds)
            found[name].setdefault(PEAK, []).append(worker.peak_bytes)
            worker.close()
    return found


def main() -> None:
    """Measures every contender and prints tokens a second, shares of the bound and ratios."""
    from rich.table import Table

    from recurrentgemma.common.model.layer_spec import num_parameters

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="2b-6")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[*ROWS])
    parser.add_argument("--only", nargs="+", help='contenders, such as "jax q8"')
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        framework, _, form = arguments.worker.partition(" ")
        numbers = arguments.rows
        serve(decoding(framework, form, arguments.size, numbers) if form else reading())
        return
    numbers = sorted(arguments.rows)
    commands = contenders(arguments.size, arguments.only, numbers)
    weights = num_parameters(config(arguments.size))
    needed = weights * sum(FORMS[name.split()[1]] for name in commands if name != BOUND)
    room = SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with tempfile.TemporaryDirectory() as cache:
        seconds = run(commands, arguments.rounds, needed < room, cache)
    rate = READ / statistics.median(seconds.pop(BOUND)["1"])
    sizes = {name: found.pop(SIZE)[0] for name, found in seconds.items()}
    steps = {
        name: {rows: statistics.median(found[str(rows)]) for rows in numbers}
        for name, found in seconds.items()
    }
    columns = [f"{rows} row{'s' * (rows > 1)}, ms" for rows in numbers]
    table = Table("", "GB", "peak, GB", *columns, "tokens/s", "x float32", "of memory")
    for name, found in steps.items():
        plain = steps.get(f"{name.split()[0]} float32")
        table.add_row(
            name,
            f"{sizes[name] / 1e9:.2f}",
            f"{max(seconds[name][PEAK]) / 1e9:.2f}",
            *(spread(seconds[name][str(rows)]) for rows in numbers),
            " / ".join(f"{rows / found[rows]:.3g}" for rows in numbers),
            " / ".join(f"{plain[rows] / found[rows]:.2f}" for rows in numbers) if plain else "",
            f"{sizes[name] / found[numbers[0]] / rate:.0%}",
        )
    table.caption = f"memory is read at {rate / 1e9:.1f} GB/s; tokens/s at {numbers} rows"
    results = {"seconds": seconds, "bytes": sizes, "bytes_per_second": rate, "size": arguments.size}
    publish(table, results, arguments.output)


if __name__ == "__main__":
    main()
