"""The sentencepiece model from which the metadata of a GGUF were made."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import TokenizerError

_KEY = "tokenizer.ggml."
_BPE = 2  # sentencepiece's type of model
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # and types of pieces
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space
# Numbers of fields in sentencepiece's protocol buffers.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_IDS = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}  # id, piece
_NAME, _DUMMY_PREFIX, _EXTRA_SPACES = 1, 3, 4


def sentencepiece_model(path: Path, metadata: Mapping[str, Any]) -> bytes:
    """The content of a `tokenizer.model`.

    Two things are mended. The file stores a run of spaces as spaces; sentencepiece writes U+2581
    for each. The file marks pieces such as `<start_of_turn>` as control pieces, which a text cannot
    contain; only padding, BOS and EOS are.

    Raises:
      TokenizerError: The metadata describe no sentencepiece model.
    """
    kind = metadata.get(f"{_KEY}model")
    lists = [metadata.get(_KEY + name, []) for name in ("tokens", "scores", "token_type")]
    if kind != "llama" or len(set(map(len, lists))) != 1:
        raise TokenizerError(
            f"{path}: {_KEY}model must be 'llama', with tokens, scores and token_type of one "
            f"length, got {kind!r}"
        )
    tokens, scores, kinds = lists
    ids = {name: metadata.get(f"{_KEY}{name}_token_id", -1) for name in _IDS}
    if any(not -1 <= number < len(tokens) for number in ids.values()):
        raise TokenizerError(f"{path}: special ids must be below {len(tokens)}, got {ids}")
    control = {number for name, number in ids.items() if name != "unknown"}
    pieces = []
    for i, (text, score, piece) in enumerate(zip(tokens, scores, kinds, strict=True)):
        shown = text.replace(" ", _SPACE) if not text.strip(" ") else text
        mended = _USER_DEFINED if piece == _CONTROL and i not in control else piece
        fields = _bytes(1, shown.encode()) + b"\x15" + struct.pack("<f", score)
        fields += b"" if mended == _NORMAL else _number(3, mended)
        pieces.append(_bytes(_PIECES, fields))
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_VOCAB_SIZE, len(tokens))
    trainer += _number(_BYTE_FALLBACK, int(_BYTE in kinds))
    for name, (id_field, piece_field) in _IDS.items():
        trainer += _number(id_field, ids[name])
        if ids[name] >= 0:
            trainer += _bytes(piece_field, tokens[ids[name]].encode())
    prefix = int(bool(metadata.get(f"{_KEY}add_space_prefix", True)))
    normalizer = _bytes(_NAME, b"identity")
    normalizer += _number(_DUMMY_PREFIX, prefix) + _number(_EXTRA_SPACES, 0)
    return b"".join(pieces) + _bytes(_TRAINER, trainer) + _bytes(_NORMALIZER, normalizer)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % 2**64)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
