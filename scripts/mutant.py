"""Looks for a fault in the copy of the package that this process imports: see mutation.py.

Takes JSON on its command line, and prints JSON: the first test that fails, and what `parity`
first finds beyond its budget. One process, so that the frameworks are imported once.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from typing import Any


class FirstFailure:
    """A plugin of pytest that keeps the first test that fails."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def first_failure(likely: str | None, tests: list[str], words: str) -> str | None:
    """The first test that fails: the one that is likely to, or else the first of all."""
    import pytest

    flags = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    for arguments in ([likely] if likely else [], ["-k", words, *tests]):
        if not arguments:
            continue
        failure, said = FirstFailure(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*flags, *arguments], plugins=[failure])
        if failure.name is not None:
            return failure.name
        if code != pytest.ExitCode.OK and arguments != [likely]:  # the likely one may have gone
            raise RuntimeError(f"pytest broke: {said.getvalue()[-4000:]}")
    return None


def beyond(checkpoint: str, options: list[str]) -> str | None:
    """What `parity` first finds beyond its budget."""
    import jaxtyping

    from recurrentgemma.cli import main

    jaxtyping.config.update("jaxtyping_disable", True)  # as in a process of its own
    flags = ["--greedy", "0", "--length", "28", "--json", *options]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings():
            code = main(["parity", checkpoint, *flags])
    except Exception as error:  # a model that cannot run is no model of this checkpoint
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if not said.getvalue().startswith("{"):
        raise RuntimeError(f"parity broke: {said.getvalue()[-4000:]}")
    if not code:
        return None
    first = json.loads(said.getvalue())["first_beyond"]
    where = f", {first['case']}" if first["case"] else ""
    return f"`{first['name']}`{where}"


def main() -> None:
    asked = json.loads(sys.argv[1])
    test = first_failure(asked["likely"], asked["tests"], asked["words"])
    found = None
    for checkpoint, options in asked["runs"]:
        found = found or beyond(checkpoint, options.split())
    print(json.dumps({"test": test, "parity": found}))


if __name__ == "__main__":
    main()
