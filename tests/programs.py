"""Programs that need a process of their own, several in one: it starts once."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent
RUNNER = """
import json, sys, traceback

before, programs = json.load(sys.stdin)
exec(before)
failures = {}
for name, program in programs.items():
    try:
        exec(compile(program, name, "exec"), {})
    except Exception:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


def run_programs(programs: Mapping[str, str], before: str = "") -> dict[str, str]:
    """Runs `before`, then each program; returns the tracebacks of those that failed."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([before, programs]),
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
