"""Trains on every mesh with every method and batch, and compares with one device.

python scripts/sharding_grid.py jax|torch [FILE]

Three steps in float64: on eight devices that JAX makes of a CPU, or on two and four processes of
PyTorch over loopback. Writes the table to FILE, or to benchmarks/results/sharding-jax-cpu.md or
sharding-torch-cpu.md, and exits with 1 if a difference is above 1e-10.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMIT = 1e-10
Row = tuple[str, list[float]]


def jax_rows() -> tuple[str, Sequence[str], Iterator[Row]]:
    """The version, the meshes, and the differences on them of each method and batch."""
    import jax
    from meshes import BATCHES, MESHES, METHODS, difference, trained

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)

    def rows() -> Iterator[Row]:
        for method in METHODS:
            for kind in BATCHES:
                alone = trained(method, kind, None)
                found = [difference(trained(method, kind, mesh), alone) for mesh in MESHES]
                yield f"{method}, {kind}", found

    return f"jax {jax.__version__}", MESHES, rows()


def torch_rows() -> tuple[str, Sequence[str], Iterator[Row]]:
    """The version, the meshes, and the differences on them of each method."""
    import sharded
    import torch
    from processes import Processes
    from sharded import CONFIG, OPTIONS, PARTS, STRATEGIES, config_of, count_of, params_of
    from trainers import make_batch

    batches: dict[Any, list[Any]] = {  # packed and padded rows
        config: [make_batch(config, seed, rows=4, length=16) for seed in range(3)]
        for config in (CONFIG, PARTS)
    }
    pools = {count: Processes(count) for count in (2, 4)}

    def differences(options: Any) -> Iterator[float]:
        alone = {
            config: sharded.steps(sharded.state_of(config, params_of(config), None, options), some)
            for config, some in batches.items()
        }
        for mesh in STRATEGIES:
            config = config_of(mesh)
            args = config, params_of(config), mesh, options, batches[config]
            found, *_ = pools[count_of(mesh)].run(sharded.train, *args)
            pairs = zip(arrays(found), arrays(alone[config]), strict=False)
            yield max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs)

    def arrays(result: dict[str, Any]) -> list[np.ndarray]:
        return [*result["state"].values(), *result["model"].values(), result["metrics"]]

    def rows() -> Iterator[Row]:
        for method, options in OPTIONS.items():
            yield f"{method}, packed and padded", list(differences(options))
        for pool in pools.values():
            pool.stop()

    return f"torch {torch.__version__}", STRATEGIES, rows()


def main() -> int:
    """Runs the grid."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("jax", "torch"):
        sys.exit("usage: python scripts/sharding_grid.py jax|torch [FILE]")
    framework = sys.argv[1]
    version, meshes, rows = {"jax": jax_rows, "torch": torch_rows}[framework]()
    path = ROOT / f"benchmarks/results/sharding-{framework}-cpu.md"
    if len(sys.argv) > 2:
        path = Path(sys.argv[2])
    lines = [
        f"# Three steps on a mesh and on one device, float64, {version}",
        "",
        "The largest relative difference of parameters, moments, loss and norm. Made by",
        f"`python scripts/sharding_grid.py {framework}`.",
        "",
        f"| method, batch | {' | '.join(meshes)} |",
        "|---" * (1 + len(meshes)) + "|",
    ]
    worst = 0.0
    for name, found in rows:
        worst = max(worst, *found)
        lines.append(f"| {name} | {' | '.join(f'{x:.1e}' for x in found)} |")
        print(lines[-1], flush=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
