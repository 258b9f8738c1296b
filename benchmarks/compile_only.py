"""The training step of the published models, compiled for 256 TPU chips that are not there.

    python benchmarks/compile_only.py benchmarks/results/step-v5e-256.md

It needs `libtpu` (`make tpu`) and takes minutes for each model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TWO, NINE = "RECURRENT_GEMMA_2B_V1", "RECURRENT_GEMMA_9B_V1"
ADAPTERS = ("--lora-rank", "8", "--quantize", "q8")
STEPS = {
    f"`{TWO}`": (TWO,),
    f"`{NINE}`": (NINE,),
    f"`{NINE}`, `q8` and adapters": (NINE, *ADAPTERS),
}
TOPOLOGY = "v5e:16x16"
SIZES = ("--mesh", "fsdp=256", "--batch-size", "256", "--length", "2048")


def compiled(*options: str) -> dict[str, Any]:
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
        [*command, "--preset", *options, *SIZES], stdout=subprocess.PIPE, text=True, check=True
    )
    after = os.times()
    spent = [t.children_user + t.children_system for t in (before, after)]
    return json.loads(done.stdout) | {"processor": spent[1] - spent[0]}


def table(steps: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The figures as a table of Markdown."""

    def row(name: str, *values: str) -> str:
        return f"| {' | '.join((name, *values))} |"

    def size(name: str, function: Callable[[Mapping[str, Any]], int | None]) -> str:
        sizes = map(function, steps.values())
        return row(name, *("" if s is None else f"{s / 1e9:.2f} GB" for s in sizes))

    yield row("a chip", *steps)
    yield "|---" * (len(steps) + 1) + "|"
    yield size("weights, moments and batch", lambda s: s["held"])
    yield size("beside them", lambda s: s["temporary"])
    yield size("**together, of 16 GB**", lambda s: s["held"] + s["temporary"])
    for source, words in (("sent", "sends"), ("computed", "`inspect` says")):
        found = [step[source] for step in steps.values() if source in step]
        for kind in dict.fromkeys(kind for sizes in found for kind in sizes):
            yield size(
                f"{words}, {kind}", lambda s, k=kind, f=source: s[f].get(k, 0) if f in s else None
            )
        yield size(
            f"**{words}, together**", lambda s, f=source: sum(s[f].values()) if f in s else None
        )
    minutes = (f"{step['processor'] / 60:.1f} minutes" for step in steps.values())
    yield row("a processor's time to compile", *minutes)


def main() -> None:
    """Compiles, and writes the table."""
    import jax

    steps = {name: compiled(*options) for name, options in STEPS.items()}
    said = f"{TOPOLOGY}, {' '.join(SIZES)}, jax {jax.__version__}"
    Path(sys.argv[1]).write_text("\n".join([*table(steps), "", said, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
