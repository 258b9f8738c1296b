"""A stream of a million tokens: state, memory and time per token must not grow after 4k tokens.

    python benchmarks/long_stream.py [--tokens 1000000] [--frameworks jax torch]

Each framework runs in its own process, with a model of 0.2M parameters and a window of 64. It reads
text in stretches of 2000 words, each from the state that the previous one left. At 4k tokens and at
each tenth of the way it generates 500 tokens and prints a row. It exits with 1 if the state or the
memory of the last row is above 1.1 times the value at 4k, or a median time above 1.25 times.
"""

import argparse
import collections
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from interleaved import publish
from rich.table import Table

FIRST, STRETCH, GENERATED = 4096, 2000, 500


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def stream(framework: str, tokens: int) -> None:
    """Streams, and prints a JSON line at each mark."""
    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.model.griffin import GriffinConfig

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
    marks = [FIRST, *np.linspace(0, tokens, 11).astype(int)[1:].tolist()]
    words = ["in", "the", "beginning", "and", "it", "came", "to", "pass", "that", "she", "was"]
    rng = np.random.default_rng(0)
    options = {"rng": 0, "sampling": Categorical(), "end_sampling_at_eos_token": False}
    state, position = sampler.prefill("In the beginning"), 0
    recent = collections.deque(maxlen=20)  # seconds per token of the last stretches
    while marks:
        text = " ".join(rng.choice(words, STRETCH))
        start = time.perf_counter()
        state = sampler.prefill(text, state)
        seconds, before = time.perf_counter() - start, position
        position = int(state.lengths[0])
        recent.append(seconds / (position - before))
        if position < marks[0]:
            continue
        del marks[0]
        times = [time.perf_counter()]
        going = sampler.stream(state, GENERATED, **options)
        times += [time.perf_counter() for _ in going]
        gc.collect()
        report = {
            "tokens": position,
            "state_bytes": going.state.nbytes,
            "memory_bytes": resident(),
            "us_a_token_read": float(np.median(recent)) * 1e6,
            "ms_a_token_generated": float(np.median(np.diff(times))) * 1e3,
        }
        print(json.dumps(report), flush=True)


def main() -> int:
    """Runs each framework; returns 0 if nothing grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--frameworks", nargs="+", default=["jax", "torch"])
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--stream", metavar="FRAMEWORK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        stream(arguments.stream, arguments.tokens)
        return 0
    flat = True
    columns = ("tokens", "state kB", "memory MB", "us a token read", "ms a token generated")
    table, results = Table("", *columns), {}
    for framework in arguments.frameworks:
        command = [sys.executable, __file__, "--stream", framework]
        command += ["--tokens", str(arguments.tokens)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows = results[framework] = [json.loads(line) for line in out.splitlines()]
        for row in rows:
            table.add_row(
                framework,
                f"{row['tokens']:,}",
                f"{row['state_bytes'] / 1e3:.1f}",
                f"{row['memory_bytes'] / 1e6:.1f}",
                f"{row['us_a_token_read']:.1f}",
                f"{row['ms_a_token_generated']:.3f}",
            )
        first, last = rows[0], rows[-1]
        flat &= last["state_bytes"] == first["state_bytes"]
        flat &= last["memory_bytes"] <= 1.1 * first["memory_bytes"]
        for name in ("us_a_token_read", "ms_a_token_generated"):
            flat &= last[name] <= 1.25 * first[name]
    publish(table, results, arguments.output)
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
