"""The command line `recurrentgemma`: no framework is imported before a command needs one."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

USER_MISTAKE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # the last two as a shell reports signals


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      args: The words after the program's name; those of this process if None.

    Returns:
      The exit code: 0, 2 after a mistake of the user's (told on stderr, in a line), 130 after
      Ctrl-C, 141 when whoever read the output stopped reading. Anything unexpected is raised.
    """
    try:
        # Here, so that Ctrl-C ends the program quietly during the import, too.
        from recurrentgemma.cli.app import run

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # of what the terminal's encoding lacks
        code = run(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # below the ^C
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:
        from recurrentgemma.cli.errors import mistake

        message = mistake(error)
        if message is None:
            raise
        sys.stderr.write(f"recurrentgemma: error: {message}\n")
        return USER_MISTAKE
    return code
