"""Peak memory of reading a long prompt in chunks of 2048 tokens: it must not grow with the prompt.

    python benchmarks/prefill_memory.py

Each measurement runs in its own process: a 5M-parameter model (the bundled model's shape) reads the
prompt, and the process reports its peak memory. Prints a table and the ratio of the longest prompt
to the shortest; exits with 1 if it is above 1.2.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys

from rich.console import Console
from rich.table import Table

CHUNK = 2048
LIMIT = 1.2


def read(framework: str, length: int) -> None:
    """Reads `length` tokens and prints this process's peak memory in MB."""
    import numpy as np

    from recurrentgemma.common.model.griffin import GriffinConfig

    config = GriffinConfig(
        vocab_size=2048,
        width=256,
        mlp_expanded_width=768,
        num_heads=4,
        block_types=("recurrent", "recurrent", "attention") * 2,  # pyright: ignore[reportArgumentType]
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=128,
        logits_soft_cap=30.0,
    )
    if framework == "jax":
        import jax

        from recurrentgemma.jax import Griffin, init_params

        model, params = Griffin(config), init_params(config, 0)

        forward = jax.jit(functools.partial(model.apply, {"params": params}, last_logits_only=True))
        cache = model.init_cache(1)
    else:
        import torch

        from recurrentgemma.torch import Griffin

        model = Griffin(config)
        torch.set_grad_enabled(False)

        forward = functools.partial(model, last_logits_only=True)
        cache = model.init_cache(1)
    rng = np.random.default_rng(0)
    logits = None
    for start in range(0, length, CHUNK):
        tokens = rng.integers(config.vocab_size, size=(1, CHUNK))
        logits, cache = forward(tokens, np.arange(start, start + CHUNK)[None], cache)
    assert logits is not None
    assert np.isfinite(np.asarray(logits)).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"framework": framework, "tokens": length, "peak_mb": round(peak, 1)}))


def main() -> int:
    """Runs every measurement; returns 0 if memory does not grow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--frameworks", nargs="+", default=["jax", "torch"])
    parser.add_argument("--read", nargs=2, metavar=("FRAMEWORK", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read[0], int(arguments.read[1]))
        return 0
    table = Table("framework", "tokens", "peak MB", "ratio")
    worst = 0.0
    for framework in arguments.frameworks:
        first = None
        for length in arguments.lengths:
            command = [sys.executable, __file__, "--read", framework, str(length)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak = json.loads(done.stdout)["peak_mb"]
            first = first or peak
            worst = max(worst, peak / first)
            table.add_row(framework, f"{length:,}", f"{peak:,.0f}", f"{peak / first:.3f}")
    Console().print(table)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
