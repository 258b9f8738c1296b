"""Which exceptions are the user's mistakes, and what to say of them."""

from __future__ import annotations

import traceback
from pathlib import Path

import typer

from recurrentgemma.common.errors import CheckpointError
from recurrentgemma.common.extras import EXTRA_OF, is_installed, missing
from recurrentgemma.common.io.files import NO_ROOM

_PACKAGE = Path(__file__).resolve().parent.parent
# typer has no public name for it: options unknown, missing or malformed.
_UsageError = typer.BadParameter.__bases__[0]
_LONGEST_LINE = 300


def mistake(error: Exception) -> str | None:
    """What to tell the user of an error, or None if it is no mistake of theirs.

    Mistakes are wrong usage, files that cannot be read, packages of an extra that are not
    installed, every `CheckpointError`, and every `ValueError` that this package raises itself; one
    that comes out of what it calls is a defect.
    """
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "recurrentgemma"
        message: str = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        message = message.replace("Value error, ", "")  # pydantic's, in recent typers
        return f"{_in_a_line(message)} (see {command} --help)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"cannot write the output: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRA_OF and not is_installed(package):
            return str(missing(package))
    if isinstance(error, CheckpointError) or (
        isinstance(error, ValueError) and _raised_here(error)
    ):
        return _in_a_line(str(error))
    return None


def _raised_here(error: Exception) -> bool:
    """Whether it was raised by a `raise` in this package, not by a function in C, say."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not (frames[-1].line or "").startswith("raise"):
        return False
    return Path(frames[-1].filename).resolve().is_relative_to(_PACKAGE)


def _in_a_line(message: str) -> str:
    """The message in one line; a list that is too long for that stays a list."""
    first, *rest = filter(None, map(str.strip, message.rstrip(".").splitlines()))
    line = " ".join([first, "; ".join(rest)]) if rest else first
    return line if len(line) <= _LONGEST_LINE else message
