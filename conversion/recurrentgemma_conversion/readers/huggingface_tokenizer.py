"""A sentencepiece model as the files from which `transformers` makes a tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recurrentgemma.common.errors import TokenizerError
from recurrentgemma.common.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer

_UNIGRAM, _BPE = 1, 2  # sentencepiece's model types
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # and types of pieces
_TURNS = (START_OF_TURN, END_OF_TURN)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space
# In Jinja: BOS, then the turns of user and model one after the other, without the white space
# around them; a system text before the user's first words.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set told = messages and messages[0]['role'] == 'system' %}"
    "{% set spoken = messages[1:] if told else messages %}"
    "{% for message in spoken %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{% if role != ['user', 'model'][loop.index0 % 2] %}"
    "{{ raise_exception('user and assistant must alternate, the user first, got the role '"
    " ~ message['role'] ~ ' for message ' ~ loop.index0) }}"
    "{% endif %}"
    f"{{{{ '{START_OF_TURN}' + role + '\\n' }}}}"
    "{% if told and loop.first and messages[0]['content'] %}"
    "{{ messages[0]['content'] + '\\n\\n' }}"
    "{% endif %}"
    f"{{{{ message['content'] | trim + '{END_OF_TURN}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START_OF_TURN}model\\n' }}}}{{% endif %}}"
)


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a sentencepiece model: the same ids.

    Where there are pieces for turns, a chat template is written, too: it gives the text of
    `apply_it_formatter`, turn after turn.

    A text that spells a special token has that token's id in `transformers`, and is text in
    sentencepiece. Nothing is written for a model that normalises text; no published one does; nor
    for any other tokenizer, whose own files are these.
    """
    if not hasattr(tokenizer.vocab, "serialized_model_proto"):
        return
    model = _parse(tokenizer.vocab.serialized_model_proto())
    if model.normalizes or model.kind not in (_UNIGRAM, _BPE):
        return
    names = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.vocab.unk_id(),
    }
    config = {name: model.pieces[i].text for name, i in names.items()} | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # none
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if all(model.has(turn) for turn in _TURNS):
        config["chat_template"] = _CHAT_TEMPLATE
    _write(folder / "tokenizer.json", _tokenizer(model, tokenizer))
    _write(folder / "tokenizer_config.json", config)


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _Model(NamedTuple):
    pieces: list[_Piece]
    kind: int
    byte_fallback: bool
    normalizes: bool

    def has(self, text: str) -> bool:
        """Whether a text is a piece."""
        return any(piece.text == text for piece in self.pieces)


def _tokenizer(model: _Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    bos, unk = (model.pieces[i].text for i in (tokenizer.bos_id, tokenizer.vocab.unk_id()))
    common: dict[str, Any] = {"byte_fallback": model.byte_fallback}
    if model.kind == _BPE:
        vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
        common |= {"type": "BPE", "unk_token": unk, "fuse_unk": True, "vocab": vocab}
        common |= {"merges": _merges(model.pieces, vocab)}
    else:
        common |= {"type": "Unigram", "unk_id": tokenizer.vocab.unk_id()}
        common |= {"vocab": _scores(model.pieces)}
    # A user-defined piece is never split in a BPE model; in a Unigram one it is only likely.
    added = {
        i: piece.text
        for i, piece in enumerate(model.pieces)
        if piece.kind in (_UNKNOWN, _CONTROL)
        or (piece.kind == _USER_DEFINED and (model.kind == _BPE or piece.text in _TURNS))
    }
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": model.pieces[i].kind != _USER_DEFINED or text in _TURNS,
            }
            for i, text in added.items()
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": common,
    }


def _scores(pieces: list[_Piece]) -> list[tuple[str, float]]:
    """The pieces' scores; sentencepiece computes those of user-defined pieces itself."""
    best = max(piece.score for piece in pieces if piece.kind == _NORMAL)
    return [
        (text, len(text) * best - 0.1 if kind == _USER_DEFINED else score)
        for text, score, kind in pieces
    ]


def _merges(pieces: list[_Piece], ids: dict[str, int]) -> list[list[str]]:
    """Every way to join two pieces into a third, the best third first."""
    known = {piece.text for piece in pieces if piece.kind == _NORMAL}
    found = [
        (-piece.score, ids[piece.text], ids[piece.text[:i]], ids[piece.text[i:]])
        for piece in pieces
        if piece.kind == _NORMAL
        for i in range(1, len(piece.text))
        if piece.text[:i] in known and piece.text[i:] in known
    ]
    return [[pieces[left].text, pieces[right].text] for _, _, left, right in sorted(found)]


def _parse(proto: bytes) -> _Model:
    """A sentencepiece model's pieces, and how it changes text."""
    pieces, trainer, normalizer = [], {}, {}
    for field, value in _fields(proto):
        if not isinstance(value, bytes):  # sentencepiece skips it, too
            continue
        if field == 1:
            text, score, kind = _piece(value)
            try:
                pieces.append(_Piece(text.decode(), *struct.unpack("<f", score), kind))
            except UnicodeDecodeError as error:
                raise TokenizerError(
                    f"the tokenizer's piece {len(pieces)} must be UTF-8, got {text!r}"
                ) from error
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    changes = normalizer.get(2) or normalizer.get(3, 1) or normalizer.get(4, 1)
    return _Model(pieces, trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0)), bool(changes))


def _piece(message: bytes) -> tuple[bytes, bytes, int]:
    """The text, the score and the kind of a piece."""
    size = len(message) - 7
    if 0 <= size < 128 and message[:2] == bytes((0x0A, size)) and message[-5] == 0x15:
        return message[2:-5], message[-4:], _NORMAL  # nearly all have a text and a score alone
    known: dict[int, Any] = {1: b"", 2: struct.pack("<f", 0), 3: _NORMAL}
    for field, value in _fields(message):
        same = field in known and isinstance(value, type(known[field]))
        if same and (field != 2 or len(value) == 4):
            known[field] = value
    return known[1], known[2], known[3]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers as such, others as bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        field, kind = divmod(number(), 8)
        if kind == 0:
            yield field, number()
            continue
        size = {1: 8, 5: 4}.get(kind) or number()
        yield field, message[at : at + size]
        at += size


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
