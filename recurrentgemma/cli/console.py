"""Reading and writing in a terminal, shared by the commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from recurrentgemma.common.errors import UserError


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Shows on stderr, if it is a terminal, that the program is working."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


def read_stdin() -> str:
    """All of stdin without the newline at its end, as in a shell's `$(...)`.

    Raises:
      ValueError: Stdin is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise UserError("there is no prompt: give one as an argument or on stdin")
    if sys.stdin.isatty():
        sys.stderr.write("Type the prompt, then Ctrl-D on a line of its own:\n")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"stdin must be UTF-8 text, got byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    return text.removesuffix("\n")
