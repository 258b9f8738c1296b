"""Text to tokens and back: tokenizer, chat template, padding with positions, streaming."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.vocabulary import SENTENCEPIECE, JsonVocabulary, apart, open_vocabulary

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
_USER, _MODEL = f"{START_OF_TURN}user\n", f"{END_OF_TURN}\n{START_OF_TURN}model\n"
# Pieces that control a model. A user's words must not become one of them.
_CONTROLS = (
    START_OF_TURN,
    END_OF_TURN,
    "<start_of_image>",
    "<end_of_image>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|file_separator|>",
)


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
    return _USER + input_string + _MODEL


def with_system(system: str, words: str) -> str:
    """The user's first words, after what the model is told before them."""
    return f"{system}\n\n{words}" if system else words


def token_ids(value: Any, name: str) -> list[int]:
    """Token ids in a list, in an array of any framework, [T], or in what `id_rows` takes.

    Raises:
      ValueError: It is empty, no sequence, or holds what is no integer of at least 0.
    """
    if isinstance(value, Mapping):
        rows = id_rows(value, name)
        if len(rows) != 1:
            raise UserError(f"{name} must be one text, got the token ids of {len(rows)}")
        value = rows[0]
    values = _as_list(value)
    if isinstance(values, bytes | bytearray) or not isinstance(values, Iterable):
        raise UserError(f"{name} must be a str or token ids, got {type(value).__name__}: {value!r}")
    ids = []
    for at, token in enumerate(values):
        try:
            if isinstance(token, bool) or operator.index(token) < 0:
                raise TypeError
        except TypeError:
            hint = "; Conversation.ask talks in turns" if isinstance(token, Mapping) else ""
            raise UserError(
                f"{name} must be a str or token ids, got {token!r} as token {at}{hint}"
            ) from None
        ids.append(operator.index(token))
    if not ids:
        raise UserError(f"{name} must have at least one token id, got none; BOS alone is the least")
    return ids


def id_rows(encoding: Mapping[str, Any], name: str) -> list[Any]:
    """The token ids of each text in what tokenizers of `transformers` return, without padding.

    Args:
      encoding: `input_ids` of one text or of several, and perhaps their `attention_mask`.
      name: What errors call it.

    Raises:
      ValueError: It has no `input_ids`, or the mask is of another shape.
    """
    if "input_ids" not in encoding:
        raise UserError(
            f"{name} must be a str or token ids, or have input_ids, got {dict(encoding)!r}"
        )
    ids, mask = (_as_list(encoding.get(key)) for key in ("input_ids", "attention_mask"))
    if is_token_ids(ids):
        ids, mask = [ids], mask if mask is None else [mask]
    if mask is None:
        return [*ids]
    try:
        pairs = (zip(*row, strict=True) for row in zip(ids, mask, strict=True))
        return [[token for token, counts in row if counts] for row in pairs]
    except (TypeError, ValueError):
        raise UserError(f"the attention_mask of {name} must have the shape of input_ids") from None


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def is_token_ids(value: Any) -> bool:
    """Whether a value is the token ids of one text: an array [T], or a sequence of integers."""
    if hasattr(value, "ndim"):
        return value.ndim == 1 and getattr(value.dtype, "kind", "i") not in "OSU"
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and bool(value) and (
        hasattr(value[0], "__index__")
    )  # fmt: skip


class Tokenizer:
    """A vocabulary with its special tokens, looked up by piece.

    Attributes:
      vocab: The vocabulary: a sentencepiece processor, or an object with its methods.
      pad_id: Pads a row.
      bos_id: Starts every prompt.
      eos_id: Ends a text.
      end_of_turn_id: Ends a turn of an instruction-tuned model; None if there is no such piece.
    """

    def __init__(self, vocab: Any) -> None:
        """Wraps a vocabulary.

        Args:
          vocab: What `open_vocabulary` takes: the path of a `tokenizer.model` or `tokenizer.json`,
            a tokenizer of sentencepiece, `tokenizers` or `transformers`, or an object like one. Or
            a `Tokenizer`.

        Raises:
          ValueError: There is no vocabulary, or BOS or EOS is missing.
        """
        self.vocab: Any = vocab.vocab if isinstance(vocab, Tokenizer) else open_vocabulary(vocab)
        vocab = self.vocab
        if vocab.bos_id() < 0 or vocab.eos_id() < 0:
            raise UserError("the tokenizer must have a BOS and an EOS piece, it lacks one")
        self.bos_id, self.eos_id = vocab.bos_id(), vocab.eos_id()
        self.pad_id = max(vocab.pad_id(), 0)
        self.end_of_turn_id = self._id_of(END_OF_TURN)
        self._controls = tuple(piece for piece in _CONTROLS if self._id_of(piece) is not None)

    def _id_of(self, piece: str) -> int | None:
        if not hasattr(self.vocab, "PieceToId"):
            try:
                ids = self.vocab.EncodeAsIds(piece)
                return ids[0] if len(ids) == 1 and self.vocab.DecodeIds(ids) == piece else None
            except Exception:  # the object may not know these characters
                return None
        token = self.vocab.PieceToId(piece)
        return None if token in (-1, self.vocab.unk_id()) else token

    def piece(self, token: int) -> str:
        """The piece of a token, as the vocabulary spells it."""
        named = getattr(self.vocab, "id_to_piece", None) or getattr(self.vocab, "IdToPiece", None)
        return named(token) if named else self.vocab.DecodeIds([token])

    def files(self) -> dict[str, bytes]:
        """The files that hold the tokenizer, by name.

        Raises:
          ValueError: The vocabulary is an object that cannot be written.
        """
        if isinstance(self.vocab, JsonVocabulary):
            return self.vocab.files()
        if hasattr(self.vocab, "serialized_model_proto"):
            return {SENTENCEPIECE: self.vocab.serialized_model_proto()}
        raise UserError(
            f"a {type(self.vocab).__name__} cannot be written as a file: a checkpoint needs the "
            f"tokenizer of a {SENTENCEPIECE} or a tokenizer.json"
        )

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

        A table may have rows that no piece uses: its size is often rounded up.
        """
        return getattr(self.vocab, "least_rows", self.size) <= vocab_size

    def encode(self, text: str, *, allow_control_tokens: bool = True) -> list[int]:
        """BOS and the tokens of a text; the empty text is BOS alone.

        Args:
          text: The text. If it begins with the name of BOS, BOS still comes once.
          allow_control_tokens: Whether `<start_of_turn>` and the like are tokens where the text
            spells them, or text.

        Raises:
          ValueError: The text is not a `str`, or holds an unpaired surrogate.
        """
        check_text(text)
        if not allow_control_tokens:
            return [self.bos_id, *self._encode(apart(text, self._controls))]
        return [self.bos_id, *self.vocab.EncodeAsIds(self._without_bos(text))]

    def encode_turn(
        self,
        message: str | Sequence[int],
        before: str = "",
        system: str = "",
        *,
        allow_control_tokens: bool = False,
    ) -> list[int]:
        """The tokens of a user's turn, up to the model's answer; without BOS.

        Args:
          message: The user's words, without the white space around them; or their token ids.
          before: What stands before the turn: the end of the turn before.
          system: What the model is told before the words.
          allow_control_tokens: Whether `<end_of_turn>` and the like are tokens where the words
            spell them. Then a message that is in the template already stays as it is.

        Raises:
          ValueError: The words are no Unicode text, or are in the template already.
        """
        ids = [] if isinstance(message, str) else token_ids(message, "a message")
        words = message if isinstance(message, str) else ""
        check_text(words)
        rendered = self._without_bos(words)
        if rendered.startswith(_USER) and rendered.rstrip("\n").endswith(_MODEL.rstrip("\n")):
            if allow_control_tokens:
                return self._encode([before + rendered])
            raise UserError(
                "the message is in the chat template already: give the user's words alone, or "
                f"allow control tokens; got {words[:60]!r}"
            )
        said = with_system(system, words.strip())
        parts = [said] if allow_control_tokens else apart(said, self._controls)
        parts[0] = before + _USER + parts[0]
        if ids:
            return [*self._encode(parts), *ids, *self._encode([_MODEL])]
        parts[-1] += _MODEL
        return self._encode(parts)

    def _encode(self, parts: Iterable[str]) -> list[int]:
        return [token for part in parts for token in self.vocab.EncodeAsIds(part)]

    def _without_bos(self, text: str) -> str:
        return text.removeprefix(self.piece(self.bos_id))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens are skipped."""
        return self.vocab.DecodeIds(self.spoken(tokens))

    def spoken(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that make text: no special tokens and no ids beyond the pieces."""
        special, size = {self.bos_id, self.eos_id, self.pad_id, self.end_of_turn_id}, self.size
        return [int(t) for t in tokens if t not in special and t < size]


class StreamDecoder:
    """Turns tokens into text one by one, and never prints half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # those printed last, and at most three after them
        self._printed = 0  # a token's text may depend on the ones before it

    def add(self, token: int) -> str:
        """The text that one more token makes certain; possibly empty."""
        self._tokens = [*self._tokens, *self._tokenizer.spoken([token])]  # a copy may hold the old
        certain = len(self._tokens)
        # An unfinished character, three bytes at most, decodes to U+FFFD: wait for the rest.
        least = max(self._printed, certain - 3)
        text = self._text(certain)
        while certain > least and text.endswith("\N{REPLACEMENT CHARACTER}"):
            certain -= 1
            text = self._text(certain)
        return self._advance(certain, text)

    def extend(self, tokens: Sequence[int]) -> str:
        """The text that more tokens make certain, as `add` gives it for one after another."""
        spoken = [*self._tokens, *self._tokenizer.spoken(tokens)]
        text = self._tokenizer.vocab.DecodeIds(spoken)
        if "\N{REPLACEMENT CHARACTER}" in text:  # which depends on where a text is cut
            return "".join(map(self.add, tokens))
        self._tokens = spoken
        return self._advance(len(spoken), text)

    def flush(self) -> str:
        """The text still held back; call it at the end."""
        return self._advance(len(self._tokens), self._text(len(self._tokens)))

    def _text(self, end: int) -> str:
        return self._tokenizer.vocab.DecodeIds(self._tokens[:end])  # all of them make text

    def _advance(self, end: int, text: str) -> str:
        if end == self._printed:
            return ""
        new = text[len(self._text(self._printed)) :]
        self._tokens, self._printed = self._tokens[self._printed :], end - self._printed
        return new
