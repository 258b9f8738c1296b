"""The logs of a training run: JSON lines in the order of their steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrentgemma.common.io.jsonl import OutputError


class LogFile:
    """A log that grows line by line; each write reaches the system at once."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens or creates the file.

        Args:
          path: The file.
          step: The step from which the run continues; lines of later steps, and a line cut short,
            are removed.

        Raises:
          OutputError: The file cannot be written.
        """
        self.path = path
        try:
            self._file = path.open("ab+")
            self._file.seek(0)
            whole = 0
            for data in self._file:
                entry = _entry(data)
                if entry is None or entry["step"] > step:
                    break
                whole += len(data)
            self._file.truncate(whole)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    def write(self, entry: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
          OutputError: The line cannot be written, for example because the disk is full.
        """
        try:
            self._file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; an empty list if there is no file."""
    if not path.exists():
        return []
    entries = map(_entry, path.read_bytes().splitlines(keepends=True))
    return [entry for entry in entries if entry is not None]


def _entry(data: bytes) -> dict[str, Any] | None:
    """The value of a whole line of a log; None if the line is cut short."""
    try:
        entry = json.loads(data) if data.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
