"""Batches as JSON lines: prompts read with their line numbers, results that survive a kill."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


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


def read_lines(path: Path) -> Iterator[Line]:
    """Every line of a file: a JSON string, or an object with a string "prompt". Empty ones count.

    Raises:
      OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                yield Line(number, _prompt(data), None)
            except ValueError as error:
                yield Line(number, "", f"{path}, line {number}: {error}")


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


def _prompt(data: bytes) -> str:
    value = json_value(data)
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError('a string or an object with a string "prompt" is expected')
    return prompt


class ResultFile:
    """Results as JSON lines, in order, each on the disk before the next is begun.

    A file that is there already is gone on with: its whole lines are results, and a last line that
    was cut short is taken off.

    Attributes:
      finished: The results that were there.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        """Opens the file, or makes it.

        Args:
          path: The file.
          force: Whether to begin anew if it is there.

        Raises:
          OutputError: It is there and holds something else than results, or cannot be written.
        """
        self.path = path
        self.finished: list[dict[str, Any]] = []
        try:
            self._file = path.open("ab+")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._recover(force)
        except BaseException:
            self._file.close()
            raise

    def _recover(self, force: bool) -> None:
        whole = 0
        self._file.seek(0)
        for number, data in enumerate([] if force else self._file, 1):
            if not data.endswith(b"\n"):
                break
            self.finished.append(_result(self.path, number, data))
            whole += len(data)
        self._file.truncate(whole)

    def write(self, result: dict[str, Any]) -> None:
        """Adds a result.

        Raises:
          OutputError: The disk is full, say; all results before it are kept.
        """
        data = (json.dumps(result) + "\n").encode()
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; the lines before are kept, "
                "and the same command goes on after them"
            ) from error

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told
            self._file.close()


def _result(path: Path, number: int, data: bytes) -> dict[str, Any]:
    try:
        result = json.loads(data)
        if isinstance(result, dict) and isinstance(result["line"], int):
            return result
    except (ValueError, KeyError):
        pass
    raise OutputError(f"{path} is there and its line {number} is no result; --force replaces it")
