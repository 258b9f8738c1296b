"""Products of a few rows with quantised matrices on a GPU, in both frameworks.

    python benchmarks/gpu_products.py --output benchmarks/results/NAME

It needs an NVIDIA GPU and measures the frameworks that find it. The matrices are those of
RecurrentGemma 2B; a product in bfloat16 is the bar. Each result is first compared with the exact
one. Contenders take turns, on copies of the matrix that do not fit the cache together. The rate is
that at which the matrix is read as it is stored; the card's own rate bounds it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.quantization import SCHEMES, Quantized, dequantize, quantize

MATRICES = {"recurrent": (2560, 2560), "up": (2560, 7680), "down": (7680, 2560)}
HEAD = (2560, 256_000)
ROWS = (1, 4, 16, 32)
FORMS = ("bfloat16", *SCHEMES)
TURNS, CALLS = 7, 20
CACHE = 2**28  # bytes, more than a card's cache holds
BOUND = 2**-6  # of an error, beside the largest result: bfloat16 rounds the result


class Contender(NamedTuple):
    """A product in one form.

    Attributes:
      run: Queues a number of products, and waits for them.
      result: The result of one product.
      bytes: The bytes of the matrix.
    """

    run: Callable[[int], None]
    result: Callable[[], np.ndarray]
    bytes: int


def torch_contender(x: np.ndarray, w: Quantized | np.ndarray, copies: int) -> Contender:
    """A product in PyTorch; calls are captured in a CUDA graph, as a decode step is."""
    import torch

    from recurrentgemma.torch.products import product
    from recurrentgemma.torch.quantization import QuantizedMatrix

    rows = torch.from_numpy(x).to("cuda", torch.bfloat16)
    if isinstance(w, Quantized):
        held: list[Any] = [
            QuantizedMatrix(w.with_parts(torch.from_numpy)).to("cuda").bfloat16()
            for _ in range(copies)
        ]
    else:
        held = [torch.from_numpy(w).T.contiguous().to("cuda", torch.bfloat16)]
        held += [held[0].clone() for _ in range(copies - 1)]
    axis = -2 if isinstance(w, Quantized) else -1

    @torch.no_grad()
    def one(matrix: Any) -> Any:
        return product(rows, matrix, axis=axis)

    one(held[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for matrix in held:
            one(matrix)

    def run(calls: int) -> None:
        for _ in range(-(-calls // copies)):
            graph.replay()
        torch.cuda.synchronize()

    return Contender(run, lambda: one(held[0]).float().cpu().numpy(), held[0].nbytes)


def jax_contender(x: np.ndarray, w: Quantized | np.ndarray, copies: int) -> Contender:
    """A product in JAX; one program has a product with each copy, as a decode step has."""
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax.products import product
    from recurrentgemma.jax.runtime.stored import as_on_gpu

    rows = jnp.asarray(x, jnp.bfloat16)
    if isinstance(w, Quantized):
        held: list[Any] = [
            as_on_gpu(w.replace(dtype="bfloat16").with_parts(jnp.array)) for _ in range(copies)
        ]
    else:
        held = [jnp.array(w, jnp.bfloat16) for _ in range(copies)]
    every = jax.jit(lambda held: [product(rows, matrix) for matrix in held])
    one = jax.jit(product)

    def run(calls: int) -> None:
        results = [every(held) for _ in range(-(-calls // copies))]
        jax.block_until_ready(results)

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))
    return Contender(run, lambda: np.asarray(one(rows, held[0]), np.float32), size)


def measure(contenders: dict[str, Contender], copies: int) -> dict[str, list[float]]:
    """Seconds of one product, a list with an entry for each turn."""
    calls = -(-CALLS // copies) * copies
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn, (name, contender) in itertools.product(range(TURNS + 1), contenders.items()):
        start = time.perf_counter()
        contender.run(calls)
        if turn:  # the first one warms up
            found[name].append((time.perf_counter() - start) / calls)
    return found


def checked(name: str, contender: Contender, exact: np.ndarray) -> None:
    """Raises if a result is not as exact as bfloat16."""
    error = np.abs(contender.result() - exact).max() / np.abs(exact).max()
    if not error <= BOUND:
        raise SystemExit(f"{name} is wrong: its largest error is {error:.1%} of the largest result")


def frameworks() -> dict[str, tuple[str, Callable[..., Contender]]]:
    """The frameworks that find an NVIDIA GPU: its name, and how to make a contender."""
    found: dict[str, tuple[str, Callable[..., Contender]]] = {}
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            found["torch"] = torch.cuda.get_device_name(), torch_contender
    if importlib.util.find_spec("jax"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch some memory
        import jax

        if jax.default_backend() == "gpu":
            found["jax"] = jax.devices()[0].device_kind, jax_contender
    return found


def main() -> None:
    """Prints a table as Markdown; writes it and every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write .json and .md")
    parser.add_argument("--head", action="store_true", help="the head of 256,000 outputs, too")
    options = parser.parse_args()
    found = frameworks()
    if not found:
        parser.exit(2, "no framework finds an NVIDIA GPU, which these kernels need\n")
    rng = np.random.default_rng(0)
    lines = [
        "| framework | matrix | rows | form | microseconds | GB/s |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    figures: list[dict[str, Any]] = []
    matrices = MATRICES | ({"head": HEAD} if options.head else {})
    for name, shape in matrices.items():
        dense = rng.standard_normal(shape).astype(np.float32) / shape[0] ** 0.5
        held = {scheme: quantize(dense, scheme) for scheme in SCHEMES}
        values = {form: dequantize(held[form]) if form in held else dense for form in FORMS}
        for rows, (framework, (device, contender)) in itertools.product(ROWS, found.items()):
            x = rng.integers(-8, 9, (rows, shape[0])).astype(np.float32) / 8
            copies = max(CACHE // (dense.size // 2), 1)
            contenders = {form: contender(x, held.get(form, dense), copies) for form in FORMS}
            for form, made in contenders.items():
                checked(f"{framework} {name} {form}", made, x @ values[form])
            for form, seconds in measure(contenders, copies).items():
                median = statistics.median(seconds)
                rate = contenders[form].bytes / median / 1e9
                row = framework, name, rows, form, f"{median * 1e6:.1f}", f"{rate:.0f}"
                lines.append("| " + " | ".join(map(str, row)) + " |")
                print(lines[-1], flush=True)
                figure = dict(zip(("framework", "matrix", "rows", "form"), row[:4], strict=True))
                figures.append(figure | {"device": device, "seconds": seconds})
    if options.output:
        for suffix, text in (
            (".json", json.dumps(figures, indent=1)),
            (".md", f"# Products on {figures[0]['device']}\n\n" + "\n".join(lines)),
        ):
            options.output.with_suffix(suffix).write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
