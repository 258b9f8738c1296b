"""Tokenizers of any kind, with the methods of a sentencepiece processor."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recurrentgemma.common.errors import UserError

SENTENCEPIECE, JSON = "tokenizer.model", "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE, JSON)  # a folder's tokenizer is the first that it has
_CONFIG = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "pad_token")
# Which piece has a role, where nothing says it.
_USUAL = {
    "bos_token": ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": ("<eos>", "</s>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]"),
}
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # the pieces of single bytes


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


def open_vocabulary(source: Any) -> Vocabulary:
    """Gives what a user has as a tokenizer the methods of a `Vocabulary`.

    Args:
      source: A `tokenizer.model`, a `tokenizer.json`, or a folder with one of them, by path; the
        content of one of these files; a `tokenizers.Tokenizer`; a tokenizer of `transformers`; or a
        `Vocabulary`, which is taken as it is.

    Raises:
      ValueError: There is no such file, it holds no vocabulary, or the object lacks a method.
    """
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source))
    if isinstance(source, bytes):
        return _from_content(source, "the tokenizer", {})
    if hasattr(source, "convert_tokens_to_ids"):
        return _from_transformers(source)
    if hasattr(source, "token_to_id") and hasattr(source, "to_str"):
        return JsonVocabulary(source.to_str())
    if missing := [name for name in _METHODS if not callable(getattr(source, name, None))]:
        raise UserError(
            "a tokenizer must be a path, a tokenizer of sentencepiece, tokenizers or transformers, "
            f"or an object with the methods {', '.join(_METHODS)}, got {type(source).__name__}, "
            f"which lacks {', '.join(missing)}"
        )
    return source


def _from_path(path: Path) -> Vocabulary:
    if path.is_dir():
        path = next((path / n for n in TOKENIZER_FILES if (path / n).is_file()), path / JSON)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: {' or '.join(TOKENIZER_FILES)} is expected")
    try:
        return _from_content(path.read_bytes(), str(path), _fields_beside(path))
    except OSError as error:
        raise UserError(f"{path} is no tokenizer: {error}") from error


def _fields_beside(path: Path) -> dict[str, Any]:
    """What `transformers` keeps beside a `tokenizer.json`."""
    fields: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        file = path.parent / name
        if path.suffix == ".json" and file.is_file():
            try:
                fields |= json.loads(file.read_text(encoding="utf-8-sig"))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{file} is damaged: {error}") from error
    return fields


def _from_content(content: bytes, name: str, fields: Mapping[str, Any]) -> Vocabulary:
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        try:
            return JsonVocabulary(content.decode("utf-8-sig"), fields)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8: {error}") from error
    from sentencepiece import SentencePieceProcessor  # slow to import

    vocab = SentencePieceProcessor()
    try:
        vocab.load_from_serialized_proto(content)
    except RuntimeError as error:
        raise UserError(f"{name} is not a sentencepiece model: {error}") from error
    return vocab


def _from_transformers(tokenizer: Any) -> Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return _TransformersVocabulary(tokenizer)
    names = (*_ROLES, "chat_template")
    fields = {name: value for name in names if (value := getattr(tokenizer, name, None))}
    return JsonVocabulary(backend.to_str(), fields)


class JsonVocabulary:
    """A `tokenizer.json`, run by the library `tokenizers`."""

    def __init__(self, content: str, fields: Mapping[str, Any] | None = None) -> None:
        """Reads it.

        Args:
          content: The JSON.
          fields: What a `tokenizer_config.json` says beside it: of the tokens with a role.

        Raises:
          ValueError: It holds no tokenizer.
        """
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises no other class
            raise UserError(f"no tokenizer of the library tokenizers: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content, self._fields = content, dict(fields or {})
        self._ids = {role: self._id_of_role(role) for role in _ROLES}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocab.values(), default=-1) + 1
        # Rows that a model must have: Gemma 3 adds a piece for images, with no row in text models.
        own = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self.least_rows = max(*own, *self._ids.values(), -1) + 1
        self._bytes = {i: byte for p, i in vocab.items() if (byte := byte_of(p)) is not None}
        # Sentencepiece takes these for text where a text spells them.
        self._silent = tuple(
            piece for i in (*self._ids.values(), self.unk_id()) if (piece := self.id_to_piece(i))
        )

    def _id_of_role(self, role: str) -> int:
        said = self._fields.get(role)
        name = said.get("content") if isinstance(said, Mapping) else said
        for piece in [name] if isinstance(name, str) else _USUAL[role]:
            token = self._tokenizer.token_to_id(piece)
            if token is not None:
                return token
        return -1

    def EncodeAsIds(self, text: str, /) -> list[int]:
        parts = apart(text, self._silent)
        encodings = (self._tokenizer.encode(part, add_special_tokens=False) for part in parts)
        return [token for encoding in encodings for token in encoding.ids]

    def DecodeIds(self, ids: list[int], /) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" not in text or self._bytes.keys().isdisjoint(ids):
            return text
        # The library gives up a whole run of bytes for one unfinished character.
        parts, at = [], 0
        while at < len(ids):
            end, known = at, ids[at] in self._bytes
            while end < len(ids) and (ids[end] in self._bytes) == known:
                end += 1
            if known:
                parts.append(_text(self._bytes[token] for token in ids[at:end]))
            else:
                parts.append(self._tokenizer.decode(ids[at:end], skip_special_tokens=False))
            at = end
        return "".join(parts)

    def GetPieceSize(self) -> int:
        return self._size

    def bos_id(self) -> int:
        return self._ids["bos_token"]

    def eos_id(self) -> int:
        return self._ids["eos_token"]

    def pad_id(self) -> int:
        return self._ids["pad_token"]

    def unk_id(self) -> int:
        token = self._tokenizer.token_to_id("<unk>")
        return -1 if token is None else token

    def PieceToId(self, piece: str) -> int:
        token = self._tokenizer.token_to_id(piece)
        return self.unk_id() if token is None else token

    def id_to_piece(self, token: int) -> str:
        return (self._tokenizer.id_to_token(token) or "") if token >= 0 else ""

    def files(self) -> dict[str, bytes]:
        """The files that hold it, by name, as `transformers` reads them."""
        roles = {role: piece for role, i in self._ids.items() if (piece := self.id_to_piece(i))}
        fields = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._fields | roles
        config = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        return {JSON: self._content.encode(), _CONFIG: config.encode()}


class _TransformersVocabulary:
    """A tokenizer of `transformers` that has no `tokenizer.json`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        names = (*_ROLES, "unk_token")
        self._silent = tuple(piece for n in names if (piece := getattr(tokenizer, n, None)))

    def EncodeAsIds(self, text: str, /) -> list[int]:
        parts = apart(text, self._silent)
        encoded = (self._tokenizer.encode(part, add_special_tokens=False) for part in parts)
        return [token for ids in encoded for token in ids]

    def DecodeIds(self, ids: list[int], /) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self._tokenizer.decode(ids, **options)

    def GetPieceSize(self) -> int:
        return len(self._tokenizer)

    def bos_id(self) -> int:
        return _id(self._tokenizer.bos_token_id)

    def eos_id(self) -> int:
        return _id(self._tokenizer.eos_token_id)

    def pad_id(self) -> int:
        return _id(self._tokenizer.pad_token_id)

    def unk_id(self) -> int:
        return _id(self._tokenizer.unk_token_id)

    def PieceToId(self, piece: str) -> int:
        return _id(self._tokenizer.convert_tokens_to_ids(piece))

    def id_to_piece(self, token: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token) or ""


def byte_of(piece: str) -> int | None:
    """The byte that a piece stands for; None for a piece of text."""
    found = _BYTE.fullmatch(piece)
    return int(found[1], 16) if found else None


def _id(token: int | None) -> int:
    return -1 if token is None else token


def apart(text: str, pieces: Iterable[str]) -> list[str]:
    """Cuts a text so that no part holds any of the pieces. Encode each part on its own."""
    spelled = "|".join(re.escape(piece) for piece in pieces if len(piece) > 1)
    cuts = [m.start() + 1 for m in re.finditer(f"(?={spelled})", text)] if spelled else []
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("recurrentgemma.each_byte", _each_byte)


def _text(values: Iterable[int]) -> str:
    """Decodes bytes. A byte that belongs to no character becomes U+FFFD, as in sentencepiece."""
    return bytes(values).decode(errors="recurrentgemma.each_byte")
