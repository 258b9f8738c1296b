"""When a row's text ends: at token ids, or at strings that are never printed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.tokenizer import StreamDecoder, Tokenizer, check_text


class Stops(NamedTuple):
    """What ends a row.

    Attributes:
      ids: Token ids, with the reason that each gives.
      strings: Strings; the text ends before the first that occurs.
    """

    ids: dict[int, str]
    strings: tuple[str, ...]


def checked_strings(strings: Any) -> tuple[str, ...]:
    """Stop strings, from one or several.

    Raises:
      ValueError: One is empty, no string or no Unicode text, or `strings` is not iterable.
    """
    if not isinstance(strings, Iterable):
        raise UserError(f"stop_strings must be a string or several, got {strings!r}")
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise UserError(f"stop_strings must be strings that are not empty, got {string!r}")
        check_text(string, "a stop string")
    return strings


def checked_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Stop ids.

    Raises:
      ValueError: One is no token of the vocabulary, or `ids` is not iterable.
    """
    if isinstance(ids, bytes | bytearray) or not isinstance(ids, Iterable):
        raise UserError(f"stop_ids must be a sequence of token ids, got {ids!r}")
    ids = tuple(ids)
    for token in ids:
        if not _is_token(token, vocab_size):
            raise UserError(
                f"stop_ids must be tokens of the vocabulary of {vocab_size}, got {token!r}"
            )
    return tuple(map(operator.index, ids))


def _is_token(value: Any, vocab_size: int) -> bool:
    try:
        return not isinstance(value, bool) and 0 <= operator.index(value) < vocab_size
    except TypeError:  # a framework's array that holds no integer, for example
        return False


class RowText:
    """The text of one row as its tokens come: only what is certain, and nothing past its end.

    Attributes:
      finish_reason: Why the row ended; "length" until a stop is reached.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Stops) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = stops
        self._held = ""
        self.finish_reason = "length"

    def __copy__(self) -> RowText:
        """A text that goes on from here; the tokenizer is shared."""
        fork = object.__new__(RowText)
        vars(fork).update(vars(self) | {"_decoder": copy.copy(self._decoder)})
        return fork

    @property
    def stopped(self) -> bool:
        """Whether a stop was reached."""
        return self.finish_reason != "length"

    def add(self, token: int, last: bool = False) -> str:
        """The text that became certain with one more token; with the `last`, all that remains."""
        text = self._held + self._decoder.add(token)
        if token in self._stops.ids:
            self.finish_reason = self._stops.ids[token]
        if last or self.stopped:
            text += self._decoder.flush()
        places = [text.find(string) for string in self._stops.strings]
        if found := [place for place in places if place >= 0]:
            self.finish_reason, self._held = "stop_string", ""
            return text[: min(found)]
        held = 0 if last or self.stopped else _beginning(text, self._stops.strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def extend(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that became certain with more tokens, as `add` gives it for each.

        Only the last of them may end the text; where a string may, call `add`.
        """
        text = self._decoder.extend(tokens)
        self.finish_reason = self._stops.ids.get(tokens[-1], self.finish_reason)
        return text + self._decoder.flush() if last or self.stopped else text


def _beginning(text: str, strings: Sequence[str]) -> int:
    """The length of the longest end of a text that one of the strings begins with."""
    longest = max(map(len, strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
