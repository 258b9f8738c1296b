"""Peak memory of one local attention layer over 8192 tokens: it must not grow with T squared.

    python benchmarks/attention_memory.py
    python benchmarks/attention_memory.py --published ENVIRONMENT/bin/python

Width 512, 8 heads, window 256, float32. Each measurement runs in its own process, which reports how
far its memory rose above its level before the first call: for the forward pass, and for forward and
backward together. Exits with 1 if one of ours is above 0.5 GB. See `model.py` for --published.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import publish
from model import config_of

LENGTH, WIDTH = 8192, 512
LIMIT = 0.5e9


def block_of(package: Any) -> Any:
    """A LocalAttentionBlock; the published package and ours take the same arguments."""
    config = config_of(package)
    return package.LocalAttentionBlock(
        width=config.width,
        num_heads=config.num_heads,
        window_size=config.attention_window_size,
    )


def run_jax(backward: bool) -> None:
    """The layer in `recurrentgemma.jax`."""
    import jax
    import jax.numpy as jnp

    from recurrentgemma import jax as package

    block = block_of(package)
    positions = jnp.arange(LENGTH)[None]
    params = jax.jit(block.init)(jax.random.key(0), jnp.ones((1, 8, WIDTH)), positions[:, :8])

    def loss(params, x):
        return jnp.square(block.apply(params, x, positions)[0]).sum()

    run = jax.jit(jax.grad(loss) if backward else loss)
    measure(lambda x: jax.block_until_ready(run(params, jnp.asarray(x))))


def run_torch(backward: bool) -> None:
    """The layer in `recurrentgemma.torch`."""
    import torch

    from recurrentgemma import torch as package

    block = block_of(package)
    positions = torch.arange(LENGTH)[None]

    def run(x: np.ndarray) -> None:
        with torch.set_grad_enabled(backward):
            loss = block(torch.from_numpy(x), positions)[0].square().sum()
            if backward:
                loss.backward()

    measure(run)


def measure(run: Any) -> None:
    """Prints the bytes that a first call adds to the peak of the process."""
    x = np.random.default_rng(0).standard_normal((1, LENGTH, WIDTH), np.float32)
    before = peak()
    run(x)
    print(json.dumps(peak() - before))


def peak() -> int:
    """The most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Measures each twin; 0 if both stay below the limit."""
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--published", metavar="PYTHON", help="Python with the published package")
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        framework, backward = arguments.worker
        run = {"jax": run_jax, "torch": run_torch}[framework]
        run(backward == "backward")
        return 0
    pythons = {"ours": sys.executable}
    if arguments.published:
        pythons["published"] = arguments.published
    table = Table("", "forward, MB", "forward and backward, MB")
    results: dict[str, dict[str, int]] = {}
    for whose, python in pythons.items():
        for framework in ("jax", "torch"):
            found = results[f"{whose} {framework}"] = {}
            for what in ("forward", "backward"):
                command = [python, __file__, "--worker", framework, what]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[what] = json.loads(done.stdout)
            table.add_row(f"{whose} {framework}", *(f"{v / 1e6:,.0f}" for v in found.values()))
    publish(table, {"peak_bytes": results}, arguments.output)
    ours = (v for name, found in results.items() if name.startswith("ours") for v in found.values())
    return int(max(ours) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
