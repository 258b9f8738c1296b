"""The exceptions that are a user's mistakes, and the line to print for each."""

from __future__ import annotations

import re

import typer

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.extras import EXTRA_OF, is_installed, missing
from recurrentgemma.common.io.files import NO_ROOM

# typer has no public name for it: unknown, missing or malformed options.
_UsageError = typer.BadParameter.__bases__[0]
_LONGEST_LINE = 300
# What the options are called in Python, where an error may speak of them.
_FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "logit_bias": "--logit-bias",
    "stop_strings": "--stop",
    "stop_ids": "--stop-id",
    "total_generation_steps": "--max-new-tokens",
    "num_samples": "--num-samples",
    "num_logprobs": "--logprobs",
}
_ARGUMENT = re.compile(rf"^({'|'.join(_FLAGS)})(?= must )")


def mistake(error: Exception, *, named_as_flags: bool = True) -> str | None:
    """The message for a user's mistake, or None if the error is a defect.

    Arguments of Python are named as the flags of `recurrentgemma`. Mistakes are wrong usage, files
    that cannot be read or written, packages of an extra that are not installed, and every
    `UserError`.
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
    if isinstance(error, UserError):
        return _in_a_line(_with_flags(str(error)) if named_as_flags else str(error))
    return None


def _with_flags(message: str) -> str:
    message = _ARGUMENT.sub(lambda name: _FLAGS[name[0]], message)
    message = message.replace("use Greedy", "use --temperature 0")
    return message.replace("pass force=True to replace it", "--force replaces it")


def _in_a_line(message: str) -> str:
    """The message in one line; a list that is too long for one stays a list."""
    first, *rest = filter(None, map(str.strip, message.rstrip(".").splitlines()))
    line = " ".join([first, "; ".join(rest)]) if rest else first
    return line if len(line) <= _LONGEST_LINE else message
