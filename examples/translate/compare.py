"""Compares the runs of this example in both frameworks: loss.png, results.md and the logs.

python examples/translate/compare.py runs/translate-jax runs/translate-torch
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.training.logs import read_log
from recurrentgemma.common.training.loss_plot import draw
from recurrentgemma.common.training.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SENTENCES = 12
NAMES: tuple[str, ...] = ("JAX", "PyTorch")


def sampler(framework: str, path: Path | None) -> Any:
    """A sampler in float32 for a checkpoint; the bundled model if None."""
    if framework == "PyTorch":
        import torch

        from recurrentgemma.torch import Sampler, load_checkpoint, load_tokenizer

        return Sampler(load_checkpoint(path, dtype=torch.float32), load_tokenizer())
    import jax.numpy as jnp

    from recurrentgemma.jax import Sampler, load_checkpoint, load_tokenizer

    model, params = load_checkpoint(path, dtype=jnp.float32)
    return Sampler(model, load_tokenizer(), params)


def translations(runs: dict[str, RunFolder]) -> list[str]:
    """A table of greedy answers to the first held-out sentences, before and after training."""
    lines = (HERE / "valid.jsonl").read_text(encoding="utf-8").splitlines()[:SENTENCES]
    examples = [json.loads(line) for line in lines]
    prompts = [example["prompt"] for example in examples]
    columns = [
        [prompt.strip().splitlines()[-1] for prompt in prompts],
        [example["completion"] for example in examples],
        sampler("PyTorch", None)(prompts, total_generation_steps=16).text,
        *(sampler(name, run.model)(prompts, total_generation_steps=40).text
          for name, run in runs.items()),
    ]  # fmt: skip
    heads = ["English", "reference", "before", *(f"after, {name}" for name in runs)]
    rows = [heads, ["---"] * len(heads), *zip(*columns, strict=True)]
    return [
        f"| {' | '.join(' '.join(cell.split()) or '(nothing)' for cell in row)} |" for row in rows
    ]


def losses(path: Path) -> np.ndarray:
    return np.array([(entry["step"], entry["loss"]) for entry in read_log(path) if entry["loss"]])


def difference(runs: dict[str, RunFolder], steps: int) -> float:
    """The largest relative difference of the training losses within the first steps."""
    one, other = (losses(run.train_log)[:steps, 1] for run in runs.values())
    return float(np.max(np.abs(one - other) / other))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the runs of both frameworks.")
    parser.add_argument("jax", type=Path)
    parser.add_argument("torch", type=Path)
    arguments = parser.parse_args()
    folders = (RunFolder(arguments.jax), RunFolder(arguments.torch))
    runs: dict[str, RunFolder] = dict(zip(NAMES, folders, strict=True))
    RESULTS.mkdir(exist_ok=True)
    draw(RESULTS / "loss.png", runs)
    for name, run in runs.items():
        shutil.copy(run.validation_log, RESULTS / f"validation_{name.lower()}.jsonl")
    steps = int(losses(folders[0].train_log)[-1, 0])
    lines = ["# Results", "", "## Validation loss, nats per token", ""]
    lines += [f"| step | {' | '.join(runs)} |", "|---|---|---|"]
    columns = [losses(run.validation_log) for run in folders]
    for (step, one), (_, other) in zip(*columns, strict=True):
        lines.append(f"| {step:.0f} | {one:.6f} | {other:.6f} |")
    worst = [f"{difference(runs, count):.1e}" for count in (100, steps)]
    lines += [
        "",
        f"The training losses differ by at most {worst[0]} of themselves in the first 100 steps,",
        f"{worst[1]} in all {steps}.",
        "",
        "## Translations",
        "",
        "Of the first sentences held out, none chosen; greedy.",
        "",
        *translations(runs),
    ]
    (RESULTS / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
