"""The command line `recurrentgemma`: no framework is imported before a command needs one."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

USER_MISTAKE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # the last two as a shell reports signals


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      args: The words after the program's name; those of this process if None.

    Returns:
      The exit code; see `exit_code`.
    """

    def program() -> int:
        # Here, so that Ctrl-C ends the program quietly during the import, too.
        from recurrentgemma.cli.app import run

        return run(sys.argv[1:] if args is None else args)

    return exit_code("recurrentgemma", program)


def exit_code(name: str, program: Callable[[], int | None]) -> int:
    """Runs a program to its end, whatever that is.

    Args:
      name: What it is called in messages.
      program: What to run; it returns its own exit code, or None for 0.

    Returns:
      The exit code: the program's, 2 after a mistake of the user's (told on stderr, in a line), 130
      after Ctrl-C, 141 when whoever read the output stopped reading. Anything unexpected is raised.
    """
    # None where a shell closed them (`>&-`).
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # of what the terminal's encoding lacks
        code = program()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # below the ^C
        return INTERRUPTED
    except BrokenPipeError:
        _give_up_stdout()
        return CLOSED_PIPE
    except Exception as error:
        from recurrentgemma.cli.mistakes import mistake

        message = mistake(error, named_as_flags=name == "recurrentgemma")
        if message is None:
            raise
        sys.stderr.write(f"{name}: error: {message}\n")
        _give_up_stdout()
        return USER_MISTAKE
    return code or 0


def _give_up_stdout() -> None:
    """Drops what cannot be written, since Python flushes stdout once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
