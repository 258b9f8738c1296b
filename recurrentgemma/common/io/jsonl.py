"""Batches as JSON lines: prompts with their line numbers, and results that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import locked

STDIO = Path("-")  # stdin or stdout
_OPENING = b'{"line": '  # the first bytes of every result


class LineError(UserError):
    """A line of an input file is not a prompt; the message has its number."""


class OutputError(UserError):
    """An output file cannot be written, or holds something other than results."""


class Line(NamedTuple):
    """A line of an input file.

    Attributes:
      number: Its number, from 1.
      prompt: The prompt.
      error: The reason why there is no prompt, or None.
    """

    number: int
    prompt: str
    error: str | None


def read_lines(data: bytes, name: str) -> list[Line]:
    """The lines of a file: each is a JSON string, or an object with a string "prompt".

    Empty lines are skipped, but counted.

    Args:
      data: The contents of the file.
      name: Its name in errors.
    """
    lines = enumerate(io.BytesIO(data), 1)
    return [_line(number, line, name) for number, line in lines if line.strip()]


def json_value(data: bytes) -> Any:
    """The value on a line; a `ValueError` says why it cannot be read."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: byte 0x{data[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg}, column {error.colno}") from error
    except RecursionError as error:
        raise UserError("not JSON that can be read: too deep") from error


def _line(number: int, data: bytes, name: str) -> Line:
    try:
        return Line(number, _prompt(data), None)
    except ValueError as error:
        return Line(number, "", f"{name}, line {number}: {error}")


def _prompt(data: bytes) -> str:
    value = json_value(data)
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError('a string or an object with a string "prompt" is expected')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = ord(prompt[error.start])
        raise UserError(f"not Unicode text: an unpaired surrogate \\u{code:04x}") from error
    return prompt


def require_writable(path: Path, *, replaced: bool = False) -> None:
    """Raises `OutputError` if a file clearly cannot be written.

    Args:
      path: The file; it need not exist.
      replaced: Whether a new file will replace it; otherwise it will be opened.
    """
    folder = path.parent
    if os.path.isdir(path):
        reason = errno.EISDIR
    elif not os.path.isdir(folder):
        reason = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
    elif not os.access(path if os.path.exists(path) and not replaced else folder, os.W_OK):
        reason = errno.EACCES
    else:
        return
    raise OutputError(f"cannot write {path}: {os.strerror(reason)}")


class ResultFile:
    """Results as JSON lines, each on the disk before the next one starts.

    An existing file is continued: its complete lines are results, and an incomplete last line is
    removed. It does not change before the first result is written or the block succeeds. stdout,
    a pipe and the like are never read.

    Attributes:
      path: The file.
      finished: The results that the file had, by line number; the last one counts.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        """Reads the file if it exists.

        Args:
          path: The file; `STDIO` is stdout.
          force: Whether to replace an existing file.

        Raises:
          OutputError: The file holds something other than results, or cannot be written.
        """
        self.path = path
        self.finished: dict[int, dict[str, Any]] = {}
        self._file: TextIO | None = None
        self._held = contextlib.ExitStack()  # the file and its lock
        self._force, self._regular = force, False
        self._whole = self._size = 0  # bytes of complete lines, and of the file
        if path == STDIO:
            self._file = sys.stdout
            return
        require_writable(path)
        there = os.path.exists(path)
        self._regular = path.is_file() or not there
        if there and self._regular and not force:
            self._read()

    def _read(self) -> None:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror}") from error
        with file:
            for number, data in enumerate(file, 1):
                self._size += len(data)
                if _is_cut_short(data):
                    break
                result = _result(data)
                if result is None:
                    raise OutputError(
                        f"{self.path} is there and its line {number} is no result; "
                        "--force replaces it"
                    )
                self.finished[result["line"]] = result
                self._whole += len(data)

    def _opened(self) -> TextIO:
        if self._file is None:
            with contextlib.ExitStack() as stack:
                mode = "a" if self._regular else "w"
                file = stack.enter_context(self.path.open(mode, encoding="ascii", newline="\n"))
                if self._regular:
                    self._require_own(stack.enter_context(locked(self.path)), file)
                    file.truncate(self._whole)
                self._file, self._held = file, stack.pop_all()
        return self._file

    def _require_own(self, free: bool | None, file: TextIO) -> None:
        """Raises `OutputError` if another process writes the file, or wrote it after our read."""
        size = os.fstat(file.fileno()).st_size
        if free is False or (not self._force and size != self._size):
            raise OutputError(
                f"another process {'is writing' if free is False else 'has changed'} {self.path}; "
                "once it has ended, the same command continues"
            )

    def write(self, result: dict[str, Any]) -> None:
        """Adds a result.

        Raises:
          OutputError: It cannot be written; the results before it are kept.
        """
        self._write(json.dumps(result) + "\n")

    def _write(self, text: str) -> None:
        try:
            file = self._opened()
            file.write(text)
            file.flush()
            if self._regular:
                os.fsync(file.fileno())
        except BrokenPipeError:  # the reader has stopped
            raise
        except OSError as error:
            name = "stdout" if self.path == STDIO else self.path
            kept = "; the lines before are kept, and the same command continues"
            raise OutputError(
                f"cannot write {name}: {error.strerror}{kept if self._regular else ''}"
            ) from error

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write("")
        finally:
            with contextlib.suppress(OSError):  # a failed write has raised its error before
                self._held.close()


def _is_cut_short(data: bytes) -> bool:
    """Whether a line is an incomplete result."""
    begun = data.startswith(_OPENING) or _OPENING.startswith(data)
    return begun and not data.endswith(b"\n")


def _result(data: bytes) -> dict[str, Any] | None:
    """The result on a line; None if it is something else."""
    try:
        result = json_value(data)
    except ValueError:
        return None
    is_one = (
        data.endswith(b"\n")
        and isinstance(result, dict)
        and type(result.get("line")) is int
        and (isinstance(result.get("error"), str) or isinstance(result.get("samples"), list))
    )
    return result if is_one else None
