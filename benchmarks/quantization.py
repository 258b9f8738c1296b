"""Bits a byte of held-out text with quantised weights: the bundled model, each scheme, both twins.

    python benchmarks/quantization.py [--output benchmarks/results/quantization-cpu]

The text is two chapters that the bundled model did not train on, in `notebooks/texts`. It exits
with 1 if a scheme loses more than it may: 0.1 % (q8), 1 % (q4) or 0.6 % (q4_32).
"""

import argparse
import math
import sys
from pathlib import Path

from interleaved import publish
from rich.table import Table

from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.twin import find_twin

TEXTS = Path(__file__).resolve().parents[1] / "notebooks" / "texts"
MOST = {None: 0.0, "q8": 0.1, "q4": 1.0, "q4_32": 0.6}  # per cent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    texts = [file.read_text(encoding="utf-8") for file in sorted(TEXTS.glob("*.txt"))]
    num_bytes = sum(len(text.encode()) for text in texts)
    table = Table("twin", "scheme", "bytes of weights", "bits a byte", "more, %")
    results, within = {"bytes_of_text": num_bytes}, True
    for name in ("jax", "torch"):
        twin, plain = find_twin(name), math.nan
        for scheme, most in MOST.items():
            model = twin.load(None, "float32", quantize=scheme)
            sampler = twin.sampler(model, load_tokenizer())
            total = -sum(score.total for score in sampler.score(texts)) / math.log(2)
            bits = float(total) / num_bytes
            plain = bits if scheme is None else plain
            more = 100 * (bits / plain - 1)
            within &= more <= most
            size = sampler.engine.num_bytes
            results[f"{name} {scheme or 'float32'}"] = {"bits_a_byte": bits, "bytes": size}
            cells = f"{size:,}", f"{bits:.4f}", f"{more:+.3f}"
            table.add_row(name, scheme or "float32", *cells)
    publish(table, results, arguments.output)
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
