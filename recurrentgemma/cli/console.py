"""Reading and writing in a terminal, shared by the commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.text import text_of


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Shows on stderr, if it is a terminal, that the program is working."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Undoes, after a command, what `be_silent` did in it."""
    streams = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def be_silent() -> None:
    """Has the rest of this command print nothing; its error is printed."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def read_stdin() -> str:
    """All of stdin without the newline at its end, as in a shell's `$(...)`.

    Raises:
      ValueError: Stdin is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise UserError("there is no prompt: give one as an argument or on stdin")
    if sys.stdin.isatty():
        sys.stderr.write("Type the prompt, then Ctrl-D on a line of its own:\n")
    return text_of(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
