"""A stream of a million tokens: state, memory and time a token must stay as they were at 4k.

    python benchmarks/long_stream.py [--tokens 1000000] [--frameworks jax torch]

Each framework streams in a process of its own, through a model of 0.2M parameters with a window of
64. Prints a row at 4k tokens and at each tenth of the way, and exits 1 where the last row's state,
memory or median time a token is above 1.1 times that at 4k (time: 1.25 times).
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

FIRST = 4096


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def stream(framework: str, tokens: int) -> None:
    """Streams, printing a JSON line at each mark."""
    from recurrentgemma.common.checkpoint import load_tokenizer
    from recurrentgemma.common.config import GriffinConfig

    config = GriffinConfig(
        vocab_size=2048,
        width=64,
        mlp_expanded_width=96,
        num_heads=2,
        block_types=("recurrent", "recurrent", "attention"),  # pyright: ignore[reportArgumentType]
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=64,
        logits_soft_cap=30.0,
    )
    if framework == "jax":
        from recurrentgemma.jax import Categorical, Griffin, Sampler, init_params

        sampler = Sampler(Griffin(config), load_tokenizer(), init_params(config, 0))
    else:
        import torch

        from recurrentgemma.torch import Categorical, Griffin, Sampler

        torch.set_num_threads(1)
        sampler = Sampler(Griffin(config), load_tokenizer())
    marks = {FIRST, *np.linspace(0, tokens, 11).astype(int)[1:].tolist()}
    options = {"rng": 0, "sampling": Categorical(), "end_sampling_at_eos_token": False}
    going = sampler.stream("In the beginning", tokens, **options)
    recent = np.zeros(2000)  # seconds of the last tokens
    before = time.perf_counter()
    for step, _ in enumerate(going, 1):
        now = time.perf_counter()
        recent[step % len(recent)], before = now - before, now
        if step in marks:
            gc.collect()
            report = {
                "tokens": step,
                "state_bytes": going.state.nbytes,
                "memory_bytes": resident(),
                "ms_a_token": float(np.median(recent)) * 1e3,
            }
            print(json.dumps(report), flush=True)


def main() -> int:
    """Runs each framework; 0 if all stays flat."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--frameworks", nargs="+", default=["jax", "torch"])
    parser.add_argument("--stream", metavar="FRAMEWORK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        stream(arguments.stream, arguments.tokens)
        return 0
    flat = True
    for framework in arguments.frameworks:
        command = [sys.executable, __file__, "--stream", framework]
        command += ["--tokens", str(arguments.tokens)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows = [json.loads(line) for line in out.splitlines()]
        table = Table("tokens", "state kB", "memory MB", "ms a token", title=framework)
        for row in rows:
            table.add_row(
                f"{row['tokens']:,}",
                f"{row['state_bytes'] / 1e3:.1f}",
                f"{row['memory_bytes'] / 1e6:.1f}",
                f"{row['ms_a_token']:.3f}",
            )
        Console().print(table)
        first, last = rows[0], rows[-1]
        flat &= last["state_bytes"] == first["state_bytes"]
        flat &= last["memory_bytes"] <= 1.1 * first["memory_bytes"]
        flat &= last["ms_a_token"] <= 1.25 * first["ms_a_token"]
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
