"""Trains on every mesh with every method and batch, and compares with one device.

python scripts/sharding_grid.py [FILE]

Three steps in float64 on eight devices that JAX makes of a CPU. Writes the table to FILE, or to
benchmarks/results/sharding-jax-cpu.md, and exits with 1 if a difference is above 1e-10.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
from meshes import BATCHES, MESHES, METHODS, difference, trained  # noqa: E402

LIMIT = 1e-10


def main() -> int:
    """Runs the grid."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    path = ROOT / "benchmarks/results/sharding-jax-cpu.md"
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    lines = [
        f"# Three steps on a mesh and on one device, float64, jax {jax.__version__}",
        "",
        "The largest relative difference of parameters, moments, loss and norm. Made by",
        "`python scripts/sharding_grid.py`.",
        "",
        f"| method, batch | {' | '.join(MESHES)} |",
        "|---" * (1 + len(MESHES)) + "|",
    ]
    worst = 0.0
    for method in METHODS:
        for kind in BATCHES:
            alone = trained(method, kind, None)
            found = [difference(trained(method, kind, mesh), alone) for mesh in MESHES]
            worst = max(worst, *found)
            lines.append(f"| {method}, {kind} | {' | '.join(f'{x:.1e}' for x in found)} |")
            print(lines[-1], flush=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
