"""Samples from the bundled model in JAX and in PyTorch, and checks that both write the same.

python examples/demo.py
"""

import sys
import time

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PROMPTS = [
    "And he said to them,",
    "Yahweh spoke to Moses, saying,",
    "My dear Fanny,",
    "Emma was",
]
STEPS = 40
TOLERANCE = 1e-3  # on logits of magnitude 30: float32 rounding in two orders of summation


def main() -> int:
    """Shows both frameworks' greedy continuations; returns 0 if every token is the same."""
    console = Console()
    results, seconds = {}, {}
    for framework in ("jax", "torch"):
        with console.status(f"sampling with {framework}"):
            start = time.perf_counter()
            results[framework] = sample(framework)
            seconds[framework] = time.perf_counter() - start
    jax, torch = results["jax"], results["torch"]

    table = Table("prompt and greedy continuation", "JAX = PyTorch", show_lines=True)
    same = []
    for row, prompt in enumerate(PROMPTS):
        same.append(np.array_equal(jax.tokens[row], torch.tokens[row]))
        table.add_row(
            f"[bold]{prompt}[/]{escape(jax.text[row][len(prompt) :])}", "yes" if same[-1] else "NO"
        )
    console.print(table)
    error = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.logits, torch.logits, strict=True)
        if a.shape == b.shape
    )
    console.print(
        f"{sum(same)} of {len(same)} continuations of {STEPS} tokens are the same; "
        f"logits differ by at most {error:.1e}.\n"
        f"JAX took {seconds['jax']:.1f} s (compiling included), PyTorch {seconds['torch']:.1f} s."
    )
    return 0 if all(same) and error < TOLERANCE else 1


def sample(framework: str):
    """Greedy continuations with their logits, in float32."""
    if framework == "jax":
        import jax.numpy as jnp

        from recurrentgemma import jax as recurrentgemma

        model, params = recurrentgemma.load_checkpoint(dtype=jnp.float32)
        vocab = recurrentgemma.load_tokenizer()
        sampler = recurrentgemma.Sampler(model=model, vocab=vocab, params=params)
    else:
        import torch

        from recurrentgemma import torch as recurrentgemma

        model = recurrentgemma.load_checkpoint(dtype=torch.float32)
        vocab = recurrentgemma.load_tokenizer()
        sampler = recurrentgemma.Sampler(model=model, vocab=vocab)
    return sampler(
        input_strings=PROMPTS, total_generation_steps=STEPS, echo=True, return_logits=True
    )


if __name__ == "__main__":
    sys.exit(main())
