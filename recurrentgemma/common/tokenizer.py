"""Text to tokens and back: tokenizer, chat template, padding with positions, streaming."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece as spm

from recurrentgemma.common.errors import UserError

UNUSED_ROWS = 128  # 256,000 pieces have a table of 256,128 rows, 262,144 one of 262,208
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


def check_text(text: Any, name: str = "text") -> None:
    """Raises `ValueError` unless `text` is a `str` that UTF-8 can encode. The error says `name`."""
    if not isinstance(text, str):
        raise UserError(f"{name} must be a str, got {type(text).__name__}: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise UserError(
            f"{name} must be Unicode text, got an unpaired surrogate, {surrogate!r}, at "
            f"{error.start}; text.encode(errors='replace').decode() has '?' in its place"
        ) from error


def apply_it_formatter(input_string: str) -> str:
    """One user turn in the template of instruction-tuned models, up to the model's answer.

    Raises:
      ValueError: The input is not a `str`, or holds an unpaired surrogate.
    """
    check_text(input_string)
    return f"{START_OF_TURN}user\n{input_string}{END_OF_TURN}\n{START_OF_TURN}model\n"


@runtime_checkable
class Vocabulary(Protocol):
    """What a tokenizer is asked for: methods of a `sentencepiece.SentencePieceProcessor`."""

    def EncodeAsIds(self, text: str, /) -> list[int]: ...
    def DecodeIds(self, ids: list[int], /) -> str: ...
    def GetPieceSize(self) -> int: ...
    def bos_id(self) -> int: ...
    def eos_id(self) -> int: ...
    def pad_id(self) -> int: ...


_METHODS = ("EncodeAsIds", "DecodeIds", "GetPieceSize", "bos_id", "eos_id", "pad_id")


class Tokenizer:
    """A vocabulary with its special tokens, looked up by piece.

    Attributes:
      vocab: The sentencepiece processor, or an object with its methods.
      pad_id: Pads a row.
      bos_id: Starts every prompt.
      eos_id: Ends a text.
      end_of_turn_id: Ends a turn of an instruction-tuned model; None if there is no such piece.
    """

    def __init__(self, vocab: Any) -> None:
        """Wraps a vocabulary, or loads a sentencepiece model.

        Args:
          vocab: A `Vocabulary`, the path of a sentencepiece model, or the content of one.

        Raises:
          ValueError: The file is missing or not a sentencepiece model, the object lacks a method,
            or BOS or EOS is missing.
        """
        if isinstance(vocab, str | os.PathLike):
            vocab = _load(Path(vocab))
        elif isinstance(vocab, bytes):
            vocab = _parse(vocab, "the tokenizer")
        if missing := [name for name in _METHODS if not callable(getattr(vocab, name, None))]:
            raise UserError(
                f"a vocabulary must have the methods {', '.join(_METHODS)}, got "
                f"{type(vocab).__name__}, which lacks {', '.join(missing)}"
            )
        self.vocab = vocab
        if vocab.bos_id() < 0 or vocab.eos_id() < 0:
            raise UserError("the tokenizer must have a BOS and an EOS piece, it lacks one")
        self.bos_id, self.eos_id = vocab.bos_id(), vocab.eos_id()
        self.pad_id = max(vocab.pad_id(), 0)
        self.end_of_turn_id: int | None = None
        if hasattr(vocab, "PieceToId"):
            end_of_turn = vocab.PieceToId(END_OF_TURN)
            self.end_of_turn_id = None if end_of_turn == vocab.unk_id() else end_of_turn

    def require_end_of_turn(self) -> int:
        """The id that ends a turn.

        Raises:
          ValueError: The tokenizer has no such piece: the model was not tuned to chat.
        """
        if self.end_of_turn_id is None:
            raise UserError(f"the tokenizer has no {END_OF_TURN}: the model was not tuned to chat")
        return self.end_of_turn_id

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self.vocab.GetPieceSize()

    def fits(self, vocab_size: int) -> bool:
        """Whether a model with so many embeddings may have this tokenizer.

        Some formats round the size of the table up, with rows that no piece uses.
        """
        return 0 <= vocab_size - self.size <= UNUSED_ROWS

    def encode(self, text: str) -> list[int]:
        """BOS and the tokens of a text; the empty text is BOS alone.

        Raises:
          ValueError: The text is not a `str`, or holds an unpaired surrogate.
        """
        check_text(text)
        return [self.bos_id, *self.vocab.EncodeAsIds(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens are skipped."""
        return self.vocab.DecodeIds(self.spoken(tokens))

    def spoken(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that make text: no special tokens and no ids beyond the pieces."""
        special = {self.bos_id, self.eos_id, self.pad_id, self.end_of_turn_id}
        return [int(t) for t in tokens if t not in special and t < self.size]


def _load(path: Path) -> spm.SentencePieceProcessor:
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: a sentencepiece model file is expected")
    try:
        return _parse(path.read_bytes(), str(path))  # a path would have to be UTF-8
    except OSError as error:
        raise UserError(f"{path} is not a sentencepiece model: {error}") from error


def _parse(proto: bytes, name: str) -> spm.SentencePieceProcessor:
    vocab = spm.SentencePieceProcessor()
    try:
        vocab.load_from_serialized_proto(proto)
    except RuntimeError as error:
        raise UserError(f"{name} is not a sentencepiece model: {error}") from error
    return vocab


class StreamDecoder:
    """Turns tokens into text one by one, and never prints half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last printed token, and at most three after it
        self._printed = 0  # a token's text may depend on the one before it

    def add(self, token: int) -> str:
        """The text that one more token makes certain; possibly empty."""
        self._tokens += self._tokenizer.spoken([token])
        certain = len(self._tokens)
        # An unfinished character, three bytes at most, decodes to U+FFFD: wait for the rest.
        least = max(self._printed, certain - 3)
        while certain > least and self._text(certain).endswith("\N{REPLACEMENT CHARACTER}"):
            certain -= 1
        return self._advance(certain)

    def flush(self) -> str:
        """The text still held back; call it at the end."""
        return self._advance(len(self._tokens))

    def _text(self, end: int) -> str:
        return self._tokenizer.decode(self._tokens[:end])

    def _advance(self, end: int) -> str:
        text = self._text(end)[len(self._text(self._printed)) :]
        self._tokens = self._tokens[max(end - 1, 0) :]
        self._printed = min(end, 1)
        return text


def pad_left(
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    length: int | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Puts prompts into one batch, padded on the left, with positions (-1 at padding).

    Args:
      prompts: Token ids of each row.
      pad_id: The token id of padding.
      length: Length of the batch, at least the longest prompt's; that length if None.
      starts: The position of each row's first token; 0 if None.

    Returns:
      tokens and segment_pos, [B, T] int32.
    """
    longest = max(map(len, prompts), default=0)
    length = longest if length is None else length
    if length < longest:
        raise UserError(f"length must be at least the longest prompt's {longest}, got {length}")
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    segment_pos = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        if prompt:
            tokens[row, -len(prompt) :] = prompt
            start = 0 if starts is None else starts[row]
            segment_pos[row, -len(prompt) :] = np.arange(start, start + len(prompt))
    return tokens, segment_pos
