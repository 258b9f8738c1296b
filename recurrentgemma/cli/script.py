"""Scripts that report errors like the program: one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from recurrentgemma.cli import USER_MISTAKE, exit_code


class Script(argparse.ArgumentParser):
    """A script's flags and its exit."""

    def error(self, message: str) -> NoReturn:
        """Ends the script because a flag is wrong."""
        self.exit(USER_MISTAKE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def run(self, main: Callable[[argparse.Namespace], int | None]) -> NoReturn:
        """Runs `main` on the flags and ends the script with its exit code; see `exit_code`."""
        sys.exit(exit_code(self.prog, lambda: main(self.parse_args())))
