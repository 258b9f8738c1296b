"""Lines that end between words, while the text still comes."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len


class WrappedText:
    """Writes pieces of a text in lines of at most `width` columns.

    A word is written once it is complete: the next sign shows whether it fits. Scripts with wide
    signs have no spaces, so that a line may end after each of those.
    """

    def __init__(self, write: Callable[[str], object], width: int | None, column: int = 0) -> None:
        """Begins a text.

        Args:
          write: Writes a string.
          width: Columns; None writes everything as it comes.
          column: The column in which the text begins.
        """
        self._write, self._width, self._column = write, width, column
        self._space = self._word = ""

    def add(self, piece: str) -> None:
        """Writes what is complete of the text so far."""
        if self._width is None:
            self._write(piece)
            return
        for sign in piece:
            wide = cell_len(sign) > 1
            if wide or sign.isspace():
                self.flush()
            if sign == "\n":
                self._write("\n")
                self._column, self._space = 0, ""
            elif sign.isspace():
                self._space += " " if sign == "\t" else sign
            else:
                self._word += sign
                if wide or len(self._word) >= self._width:
                    self.flush()

    def flush(self) -> None:
        """Writes the word that is held back."""
        if not self._word:
            return
        new = self._space + self._word
        if self._width and self._column and self._column + cell_len(new) > self._width:
            new = self._word
            self._write("\n")
            self._column = 0
        self._write(new)
        self._column += cell_len(new)
        self._space = self._word = ""
