"""Files as the user names them; - is stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.jsonl import STDIO


def named_path(word: str) -> Path:
    """The path that a word names: - is `STDIO`, and ./- is a file of that name."""
    path = Path(word)
    return path.absolute() if path == STDIO and word != str(STDIO) else path


def source_name(path: Path) -> str:
    """The name of an input file in messages."""
    return "stdin" if path == STDIO else str(path)


def read_source(path: Path, what: str) -> bytes:
    """All of a file or of stdin.

    Args:
      path: The file.
      what: What the terminal asks the user to type.

    Raises:
      OSError: The file cannot be read.
      ValueError: Stdin is closed.
    """
    if path != STDIO:
        return path.read_bytes()
    if sys.stdin is None:
        raise UserError(f"there is no {what}: stdin is closed")
    if sys.stdin.isatty():
        sys.stderr.write(f"Type the {what}, then Ctrl-D on a line of its own:\n")
    return sys.stdin.buffer.read()
