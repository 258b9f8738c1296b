"""Applies each of `faults.FAULTS` to a copy of the package: which test sees it, and does `parity`?

    make mutation

writes tests/parity/mutations.md. Each fault runs in a process of its own, two at a time: first the
test that the last table names for it, then all of `TESTS`. Results are kept under .cache/, so that
running it again resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
TREES = ("recurrentgemma", "conversion", "tests", "pyproject.toml")
# Where a fault can be, or a difference be overlooked.
SOURCES = (
    *(f"recurrentgemma/{folder}" for folder in ("common/model", "jax", "torch", "parity")),
    "scripts/faults.py",
)
TESTS = (
    "test_modules.py",
    "test_precision_and_inputs.py",
    "test_state.py",
    "test_against_reference.py",
    "test_checkpoint.py",
)
OTHERS = "test_mixers.py"  # first for faults of what Griffin lacks
TABLE = ROOT / "tests" / "parity" / "mutations.md"
KEPT = ROOT / ".cache" / "mutation.json"
TIMEOUT = 1800  # seconds a fault
Result = dict[str, Any]


def main() -> int:
    """Checks every fault; 0 if a test and a `parity` run see each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name has this, and no table")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    args = parser.parse_args()
    faults = [fault for fault in (*FAULTS, None) if args.only in name_of(fault)]
    results = check_all(faults, args.jobs)
    unharmed = results.pop("no fault", None)
    if unharmed and (unharmed["test"] or unharmed["parity"]):
        print("without a fault the tests and parity must pass", file=sys.stderr)
        return 1
    missed = [name for name, found in results.items() if not (found["test"] and found["parity"])]
    if not args.only:
        TABLE.write_text(table(results, missed))
    print(f"{len(results) - len(missed)} of {len(results)} are seen by a test and by parity")
    return 1 if missed else 0


def name_of(fault: Fault | None) -> str:
    return "no fault" if fault is None else fault.name


def check_all(faults: list[Fault | None], jobs: int) -> dict[str, Result]:
    """What sees each fault, by its name, those that are kept looked up."""
    kept: dict[str, Result] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    sources, likely = sources_hash() + tests_hash(), last_table()
    keys = {fault: hashlib.sha256(f"{sources}{fault}".encode()).hexdigest() for fault in faults}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        checkpoints = Path(folder) / "checkpoints"
        write_checkpoints(checkpoints)

        def checked(fault: Fault | None) -> tuple[Fault | None, Result]:
            copy = Path(folder) / keys[fault]
            started = time.perf_counter()
            found = check(fault, copy, checkpoints, likely.get(name_of(fault)))
            return fault, found | {"seconds": round(time.perf_counter() - started)}

        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(checked, fault) for fault in faults if keys[fault] not in kept]
            try:
                for done in as_completed(waiting):
                    fault, found = done.result()
                    kept[keys[fault]] = found
                    KEPT.parent.mkdir(exist_ok=True)
                    KEPT.write_text(json.dumps(kept))
                    seconds = found["seconds"]
                    print(name_of(fault), found["test"], found["parity"], f"{seconds} s", sep=" | ",
                          flush=True)  # fmt: skip
            finally:
                pool.shutdown(cancel_futures=True)
    return {name_of(fault): kept[keys[fault]] for fault in faults}


def sources_hash() -> str:
    """A hash of the code in `SOURCES`; comments, docstrings and blank lines do not count."""
    digest = hashlib.sha256()
    files = [file for source in SOURCES for file in (ROOT / source).rglob("*.py")]
    files += [ROOT / source for source in SOURCES if source.endswith(".py")]
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\n{code_of(file.read_text())}\n".encode())
    return digest.hexdigest()


def code_of(text: str) -> str:
    """The lines of a module that are code. The same in every version of Python."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for i in range(docstring.lineno - 1, docstring.end_lineno or 0):
                lines[i] = ""
    stripped = (line.strip() for line in lines)
    return "\n".join(line for line in stripped if line and not line.startswith("#"))


def tests_hash() -> str:
    """A hash of the tests and scripts that look for a fault."""
    files = [*ROOT.glob("tests/*.py"), *ROOT.glob("tests/backends/*.py")]
    files += [ROOT / "tests" / "parity" / name for name in (*TESTS, OTHERS)]
    files += (ROOT / "conversion").rglob("*.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def last_table() -> dict[str, str]:
    """The test that the table names for each fault."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[2].strip("`") for row in rows if len(row) > 3 and "::" in row[2]}


def write_checkpoints(folder: Path) -> None:
    """Small models without zeros, whose embedding scales bfloat16 rounds, by `Fault.model`."""
    code = (
        "import dataclasses, sys; from pathlib import Path; from cases import make_config; "
        "from checkpoints import write_checkpoint; from recurrentgemma_conversion import Format; "
        "from test_mixers import CONFIG; "
        "griffin = make_config('RA', width=40, lru_width=24, attention_window_size=5, "
        "vocab_size=2048); other = dataclasses.replace(CONFIG, vocab_size=2048); "
        "[write_checkpoint(Path(sys.argv[1], name), Format.RECURRENTGEMMA, config, 'bfloat16') "
        "for name, config in (('griffin', griffin), ('other', other))]"
    )
    run(ROOT, "-c", code, str(folder), modules="tests/parity")


def check(fault: Fault | None, copy: Path, checkpoints: Path, likely: str | None) -> Result:
    """The first test that fails, and what `parity` first finds beyond its budget."""
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
            file = copy / fault.path
            text = file.read_text()
            if text.count(fault.old) != 1:
                raise ValueError(f"{fault.path} must have {fault.old!r} once: {fault.name}")
            file.write_text(text.replace(fault.old, fault.new))
        faults = [fault] if fault else FAULTS
        runs = sorted({(str(checkpoints / fault.model), fault.options) for fault in faults})
        others = fault is not None and fault.model == "other"
        tests = [OTHERS, *TESTS] if others else [*TESTS, OTHERS]
        asked = {
            "likely": f"tests/parity/{likely}" if likely else None,
            "tests": [f"tests/parity/{name}" for name in tests],
            "words": f"{fault.twin} or twins" if fault else "",
            "runs": runs,
        }
        script = ROOT / "scripts" / "mutant.py"
        return json.loads(run(copy, str(script), json.dumps(asked)).splitlines()[-1])
    finally:
        shutil.rmtree(copy)


def run(folder: Path, *args: str, modules: str = "") -> str:
    """Runs Python on the package in a folder, one thread, with a cache of what JAX compiles."""
    cache = KEPT.parent / "jax"
    cache.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            str(folder / part) for part in ("", "conversion", "tests", modules)
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(cache.parent / "hypothesis"),
        "CI": "1",  # the same examples each time
    }
    done = subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{args[0]} broke: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def table(results: dict[str, Result], missed: list[str]) -> str:
    lines = [
        "# Faults, and what sees them",
        "",
        "Written by `make mutation`: each fault of `scripts/faults.py` alone in one twin. The test",
        "is the first that fails; `parity` runs on a small model with the options given, and what",
        "it first finds beyond its budget is named, with the pass.",
        "",
        f"{len(results) - len(missed)} of {len(results)} are seen by both.",
        "",
        f"Sources: {sources_hash()}",
        "",
        "| fault | in | test | `parity` finds | with |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        found = results[fault.name]
        test = f"`{found['test'].removeprefix('tests/parity/')}`" if found["test"] else "**none**"
        parity = found["parity"] or "**nothing**"
        other = "another model" if fault.model == "other" else ""
        options = f"`{fault.options}`" if fault.options else other
        lines.append(f"| {fault.name} | `{fault.file}` | {test} | {parity} | {options} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
