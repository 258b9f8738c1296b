"""The training step of the published models, compiled for 256 TPU chips that are not there.

    python benchmarks/compile_only.py benchmarks/results/step-v5e-256.md

It needs `libtpu` (`make tpu`) and takes minutes for each model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PRESETS = ("RECURRENT_GEMMA_2B_V1", "RECURRENT_GEMMA_9B_V1")
TOPOLOGY = "v5e:16x16"
SIZES = ("--mesh", "fsdp=256", "--batch-size", "256", "--length", "2048")


def compiled(preset: str) -> dict[str, Any]:
    """What `train --compile-only --json` prints, and the seconds of processors that it takes."""
    command = [
        sys.executable,
        "-m",
        "recurrentgemma",
        "train",
        "--json",
        "--compile-only",
        TOPOLOGY,
    ]
    before = os.times()
    done = subprocess.run(
        [*command, "--preset", preset, *SIZES], stdout=subprocess.PIPE, text=True, check=True
    )
    after = os.times()
    spent = [t.children_user + t.children_system for t in (before, after)]
    return json.loads(done.stdout) | {"processor": spent[1] - spent[0]}


def table(steps: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The figures as a table of Markdown."""

    def row(name: str, *values: str) -> str:
        return f"| {' | '.join((name, *values))} |"

    def size(name: str, number: Mapping[str, int | float]) -> str:
        return row(name, *(f"{number[preset] / 1e9:.2f} GB" for preset in steps))

    def each(function: Any) -> dict[str, Any]:
        return {preset: function(step) for preset, step in steps.items()}

    yield row("a chip", *(f"`{preset}`" for preset in steps))
    yield "|---" * (len(steps) + 1) + "|"
    yield size("weights, moments and batch", each(lambda s: s["held"]))
    yield size("beside them", each(lambda s: s["temporary"]))
    yield size("**together, of 16 GB**", each(lambda s: s["held"] + s["temporary"]))
    for source, words in (("sent", "sends"), ("computed", "`inspect` says")):
        kinds = dict.fromkeys(kind for step in steps.values() for kind in step[source])
        for kind in kinds:
            yield size(f"{words}, {kind}", each(lambda s, k=kind, f=source: s[f].get(k, 0)))
        yield size(f"**{words}, together**", each(lambda s, f=source: sum(s[f].values())))
    minutes = (f"{step['processor'] / 60:.1f} minutes" for step in steps.values())
    yield row("a processor's time to compile", *minutes)


def main() -> None:
    """Compiles, and writes the table."""
    import jax

    steps = {preset: compiled(preset) for preset in PRESETS}
    said = f"{TOPOLOGY}, {' '.join(SIZES)}, jax {jax.__version__}"
    Path(sys.argv[1]).write_text("\n".join([*table(steps), "", said, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
