"""Examples as a user runs them, in this process; in one of their own where a package is absent."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Runs a script of `examples/` in an empty folder; fails if its exit code is another."""

    def run(name: str, *flags: str, code: int = 0) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        # A script may turn gradients off, or the search for NaN on, for its whole process.
        if "torch" in sys.modules:
            sys.modules["torch"].set_grad_enabled(True)
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_debug_nans", False)
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return said.err if code else said.out

    return run


WITHOUT = """
import contextlib, io, json, runpy, sys
absent, *scripts = sys.argv[1:]
sys.modules[absent] = None
for script in scripts:
    sys.argv, said = [script], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture
def examples_without(tmp_path):
    """Runs scripts where importing a package fails; what each says to that."""

    def run(absent: str, *names: str) -> list[str]:
        scripts = [str(ROOT / "examples" / name) for name in names]
        paths = [str(ROOT), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", WITHOUT, absent, *scripts],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        codes, said = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
        assert set(codes) == {2}, said
        return list(said)

    return run
