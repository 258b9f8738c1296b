"""Applies each of `faults.FAULTS` to a copy of the package: which test sees it, and does `parity`?

    make mutation

writes tests/parity/mutations.md. What was found of the same sources is kept under .cache/, so an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
TWINS = ("recurrentgemma/jax", "recurrentgemma/torch")
TREES = ("recurrentgemma", "conversion", "tests", "pyproject.toml")
TESTS = (
    "test_modules.py",
    "test_precision_and_inputs.py",
    "test_state.py",
    "test_against_reference.py",
)
TABLE = ROOT / "tests" / "parity" / "mutations.md"
KEPT = ROOT / ".cache" / "mutation.json"
TIMEOUT = 900  # seconds a run


def main() -> int:
    """Checks every fault; 0 if a test and a `parity` run see each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name has this, and no table")
    args = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    sources = sources_hash()
    results = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint")
        for fault in (*FAULTS, None):
            name = "no fault" if fault is None else fault.name
            if args.only not in name:
                continue
            key = hashlib.sha256(f"{sources}{fault}".encode()).hexdigest()
            if key not in kept:
                started = time.perf_counter()
                kept[key] = check(fault, Path(folder), checkpoint)
                kept[key]["seconds"] = round(time.perf_counter() - started)
                KEPT.parent.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps(kept))
            result = kept[key]
            print(
                f"{name}: {result['test']} | {result['parity']} ({result['seconds']} s)", flush=True
            )
            if fault is None:
                if result["test"] or result["parity"]:
                    print("without a fault the tests and parity must pass", file=sys.stderr)
                    return 1
            else:
                results.append((fault, result))
    missed = [fault.name for fault, found in results if not (found["test"] and found["parity"])]
    if not args.only:
        TABLE.write_text(table(results, missed))
    print(f"{len(results) - len(missed)} of {len(results)} are seen by a test and by parity")
    return 1 if missed else 0


def sources_hash() -> str:
    """Of what the outcome depends on, but the faults."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("tests/*.py"), *(ROOT / "tests" / "parity" / name for name in TESTS)]
    for tree in ("recurrentgemma/common", *TWINS, "conversion"):
        files += (ROOT / tree).rglob("*.py")
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def write_checkpoint(path: Path) -> Path:
    """A small model without zeros, a block of each kind, a scale that bfloat16 rounds."""
    code = (
        "import sys; from pathlib import Path; from cases import make_config; "
        "from checkpoints import write_checkpoint; from recurrentgemma_conversion import Format; "
        "config = make_config('RA', width=40, lru_width=24, attention_window_size=5); "
        "write_checkpoint(Path(sys.argv[1]), Format.RECURRENTGEMMA, config, 'bfloat16')"
    )
    run(ROOT, "-c", code, str(path), check=True)
    return path


def check(fault: Fault | None, folder: Path, checkpoint: Path) -> dict[str, str | None]:
    """The first test that fails, and what `parity` first finds beyond its budget; None if none."""
    copy = folder / "copy"
    copy.mkdir()
    try:
        for tree in TREES:
            source = ROOT / tree
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, copy / tree, ignore=ignore)
            else:
                shutil.copy(source, copy / tree)
        if fault is not None:
            file = copy / "recurrentgemma" / fault.file
            text = file.read_text()
            if text.count(fault.old) != 1:
                raise ValueError(f"{fault.file} must have {fault.old!r} once: {fault.name}")
            file.write_text(text.replace(fault.old, fault.new))
        return {"test": first_failure(fault, copy), "parity": beyond(fault, copy, checkpoint)}
    finally:
        shutil.rmtree(copy)


def first_failure(fault: Fault | None, copy: Path) -> str | None:
    tests = [f"tests/parity/{name}" for name in TESTS]
    wanted = "" if fault is None else f"{fault.twin} or twins"
    done = run(
        copy, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", wanted, *tests
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1) or bool(failed) != bool(done.returncode):
        raise RuntimeError(f"pytest broke: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[0].split(" ")[1] if failed else None


def beyond(fault: Fault | None, copy: Path, checkpoint: Path) -> str | None:
    runs = [fault.options] if fault else sorted({fault.options for fault in FAULTS})
    for options in runs:
        args = [*options.split(), "--greedy", "0", "--length", "28", "--json"]
        done = run(copy, "-m", "recurrentgemma.cli", "parity", str(checkpoint), *args)
        if not done.stdout.startswith("{"):
            raise RuntimeError(f"parity broke: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        if done.returncode:
            first = json.loads(done.stdout)["first_beyond"]
            where = f", {first['case']}" if first["case"] else ""
            return f"`{first['name']}`{where}"
    return None


def run(folder: Path, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs Python on the package in a folder, one thread, with a cache of what JAX compiles."""
    cache = KEPT.parent / "jax"
    cache.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(folder / part) for part in ("", "conversion", "tests")),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(cache.parent / "hypothesis"),
        "CI": "1",  # the same examples each time
    }
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=check,
    )


def table(results: list[tuple[Fault, dict[str, Any]]], missed: list[str]) -> str:
    lines = [
        "# Faults, and what sees them",
        "",
        "Written by `make mutation`: each fault of `scripts/faults.py` alone in one twin. The test",
        "is the first that fails; `parity` runs on a small model with the options given, and what",
        "it first finds beyond its budget is named, with the pass.",
        "",
        f"{len(results) - len(missed)} of {len(results)} are seen by both.",
        "",
        "| fault | in | test | `parity` finds | with |",
        "|---|---|---|---|---|",
    ]
    for fault, found in results:
        test = (
            "**none**"
            if found["test"] is None
            else f"`{found['test'].removeprefix('tests/parity/')}`"
        )
        parity = found["parity"] or "**nothing**"
        options = f"`{fault.options}`" if fault.options else ""
        lines.append(f"| {fault.name} | `{fault.file}` | {test} | {parity} | {options} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
