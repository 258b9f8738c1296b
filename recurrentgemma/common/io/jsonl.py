"""Batches as JSON lines: prompts with their line numbers, and results that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import locked, where_supported
from recurrentgemma.common.io.text import as_utf8
from recurrentgemma.common.messages import read_messages
from recurrentgemma.common.tokenizer import token_ids

STDIO = Path("-")  # stdin or stdout
_OPENING = b'{"line": '  # the first bytes of every result
_PACKED = ".gz"
_ASKED = ("prompt", "messages")
# What a result adds to the fields of its line.
RESULT_FIELDS = ("line", "seed", "samples", "error", "options")


class LineError(UserError):
    """A line of an input file is not a prompt; the message has its number."""


class OutputError(UserError):
    """An output file cannot be written, or holds something other than results."""


class Line(NamedTuple):
    """A line of an input file.

    Attributes:
      number: Its number, from 1.
      fields: What it holds: a "prompt" or "messages", and what else the user keeps there.
      error: The reason why there is no prompt, or None.
    """

    number: int
    fields: dict[str, Any]
    error: str | None

    @property
    def asked(self) -> dict[str, Any]:
        """The field that is continued."""
        return {name: self.fields[name] for name in _ASKED if name in self.fields}


def read_lines(data: bytes, name: str) -> list[Line]:
    """The lines of a file: each is a prompt, or an object with a "prompt" or with "messages".

    A prompt is a string or a list of token ids. Empty lines are skipped, but counted.

    Args:
      data: The contents of the file.
      name: Its name in errors.

    Raises:
      ValueError: The file is damaged as a whole; a damaged line has its error.
    """
    lines = enumerate(as_utf8(io.BytesIO(data), name), 1)
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
        return Line(number, _fields(data), None)
    except ValueError as error:
        return Line(number, {}, f"{name}, line {number}: {error}")


def _fields(data: bytes) -> dict[str, Any]:
    value = json_value(data)
    fields = value if isinstance(value, dict) else {"prompt": value}
    asked = [name for name in _ASKED if name in fields]
    if asked == ["messages"]:
        turns = read_messages(fields["messages"], answered=False)
        texts = [text for turn in turns for text in (turn.system, turn.content)]
    elif asked == ["prompt"] and isinstance(fields["prompt"], str):
        texts = [fields["prompt"]]
    elif asked == ["prompt"] and isinstance(fields["prompt"], list):
        token_ids(fields["prompt"], "'prompt'")
        texts = []
    else:
        raise UserError(
            'a string, or an object with a "prompt" (a string or token ids) or with "messages", is '
            "expected"
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise UserError(f"not Unicode text: an unpaired surrogate \\u{code:04x}") from error
    if taken := [name for name in RESULT_FIELDS if name in fields]:
        raise UserError(f"the result has fields of these names: rename {', '.join(taken)}")
    return fields


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
    a pipe and the like are never read. A name that ends in .gz makes a gzip file, whose every line
    is compressed on its own.

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
        self._file: Any = None  # of bytes; stdout is one of text
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
            self._size = os.fstat(file.fileno()).st_size
            lines = _members(file.read()) if self.path.suffix == _PACKED else _ends(file)
            for number, (data, end) in enumerate(lines, 1):
                if _is_cut_short(data):
                    break
                result = _result(data)
                if result is None:
                    raise OutputError(
                        f"{self.path} is there and its line {number} is no result; "
                        "--force replaces it"
                    )
                self.finished[result["line"]] = result
                self._whole = end

    def _opened(self) -> Any:
        if self._file is None:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(self.path.open("ab" if self._regular else "wb"))
                if self._regular:
                    self._require_own(stack.enter_context(locked(self.path)), file)
                    file.truncate(self._whole)
                self._file, self._held = file, stack.pop_all()
        return self._file

    def _require_own(self, free: bool | None, file: BinaryIO) -> None:
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
            file, data = self._opened(), text.encode("ascii")
            if self.path == STDIO:
                file.write(text)
            else:
                file.write(
                    gzip.compress(data, mtime=0) if data and self.path.suffix == _PACKED else data
                )
            file.flush()
            if self._regular:
                with where_supported():
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


def _ends(file: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines, each with the place in the file where it ends."""
    end = 0
    for data in file:
        end += len(data)
        yield data, end


def _members(packed: bytes) -> Iterator[tuple[bytes, int]]:
    """The lines of a gzip file, as `_ends`; one that is not whole is cut short."""
    end = 0
    while end < len(packed):
        member = zlib.decompressobj(wbits=31)
        try:
            data = member.decompress(packed[end:])
        except zlib.error:
            data = b"\0"  # no result
        if data and not member.eof:
            data = data.rstrip(b"\n")
        end = len(packed) - len(member.unused_data)
        yield from ((line, end) for line in data.splitlines(keepends=True) or [b""])


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
