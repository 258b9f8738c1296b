"""Batches as JSON lines: prompts read with their line numbers, results that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from recurrentgemma.common.io.files import locked

STDIO = Path("-")  # stdin or stdout
_OPENING = b'{"line": '  # of every result that is written


class LineError(ValueError):
    """A line of an input file that is no prompt; the message has its number."""


class OutputError(ValueError):
    """An output file that cannot be written, or that holds something else."""


class Line(NamedTuple):
    """A line of an input file.

    Attributes:
      number: From 1.
      prompt: The prompt.
      error: Why there is none, if so.
    """

    number: int
    prompt: str
    error: str | None


def read_lines(data: bytes, name: str) -> list[Line]:
    """The lines of a file: a JSON string each, or an object with a string "prompt".

    Empty ones are passed over, but counted.

    Args:
      data: What the file holds.
      name: What errors call it.
    """
    lines = enumerate(io.BytesIO(data), 1)
    return [_line(number, line, name) for number, line in lines if line.strip()]


def json_value(data: bytes) -> Any:
    """The value on a line; `ValueError` says why there is none."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{data[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: too deep") from error


def _line(number: int, data: bytes, name: str) -> Line:
    try:
        return Line(number, _prompt(data), None)
    except ValueError as error:
        return Line(number, "", f"{name}, line {number}: {error}")


def _prompt(data: bytes) -> str:
    value = json_value(data)
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError('a string or an object with a string "prompt" is expected')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = ord(prompt[error.start])
        raise ValueError(f"not Unicode text: an unpaired surrogate \\u{code:04x}") from error
    return prompt


def require_writable(path: Path, *, replaced: bool = False) -> None:
    """Raises `OutputError` where it can be told beforehand that a file cannot be written.

    Args:
      path: The file, which need not be there.
      replaced: Whether a new file will take its place, instead of its being opened.
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
    """Results as JSON lines, each on the disk before the next is begun.

    A file that is there already is gone on with: its whole lines are results, and a last line that
    was cut short is taken off. It stays as it is until the first result is written, or until the
    block ends well. What is no regular file, such as stdout or a pipe, is never read.

    Attributes:
      path: The file.
      finished: The results that were there, by their lines; of several of one line the last.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        """Reads what is there.

        Args:
          path: The file; stdout if `STDIO`.
          force: Whether to begin anew if it is there.

        Raises:
          OutputError: It is there and holds something else than results, or cannot be written.
        """
        self.path = path
        self.finished: dict[int, dict[str, Any]] = {}
        self._file: TextIO | None = None
        self._held = contextlib.ExitStack()  # the file and its lock
        self._force, self._regular = force, False
        self._whole = self._size = 0  # bytes of whole lines, and of all
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
        """Raises `OutputError` if another process writes the file, or has since it was read."""
        size = os.fstat(file.fileno()).st_size
        if free is False or (not self._force and size != self._size):
            raise OutputError(
                f"another process {'is writing' if free is False else 'has changed'} {self.path}; "
                "once it has ended, the same command goes on after it"
            )

    def write(self, result: dict[str, Any]) -> None:
        """Adds a result.

        Raises:
          OutputError: The disk is full, say; all results before it are kept.
        """
        self._write(json.dumps(result) + "\n")

    def _write(self, text: str) -> None:
        try:
            file = self._opened()
            file.write(text)
            file.flush()
            if self._regular:
                os.fsync(file.fileno())
        except BrokenPipeError:  # whoever reads has stopped
            raise
        except OSError as error:
            name = "stdout" if self.path == STDIO else self.path
            kept = "; the lines before are kept, and the same command goes on after them"
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
            with contextlib.suppress(OSError):  # what could not be written has been told
                self._held.close()


def _is_cut_short(data: bytes) -> bool:
    """Whether a line is the beginning of a result, and not the whole."""
    begun = data.startswith(_OPENING) or _OPENING.startswith(data)
    return begun and not data.endswith(b"\n")


def _result(data: bytes) -> dict[str, Any] | None:
    """The result on a line, if that is what it is."""
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
