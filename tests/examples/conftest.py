"""Examples as a user runs them: in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(tmp_path):
    """Runs a script of `examples/` in an empty folder; fails if its exit code is another."""

    def run(name: str, *flags: str, code: int = 0, absent: str | None = None) -> str:
        script = str(ROOT / "examples" / name)
        # As `python script`, where importing the absent package fails.
        program = (
            "import runpy, sys\n"
            f"if {absent!r}: sys.modules[{absent!r}] = None\n"
            f"sys.argv = {[script, *flags]!r}\n"
            f"runpy.run_path({script!r}, run_name='__main__')"
        )
        paths = [str(ROOT), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run
