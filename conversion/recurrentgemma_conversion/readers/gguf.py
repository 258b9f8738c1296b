"""`gguf`: a file of llama.cpp, which holds weights, config and tokenizer. It is only read."""

from __future__ import annotations

import functools
import importlib
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import DamagedError, MissingExtraError, UnknownFormatError
from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.io.mapped import MappedFile
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.quantization import pack
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names import config_from_metadata
from recurrentgemma_conversion.readers.base import Reader, around
from recurrentgemma_conversion.readers.gguf_tokenizer import sentencepiece_model

MAGIC = b"GGUF"
_ALIGNMENT = 32  # unless the metadata have another
_DIMENSIONS, _STRING, _ARRAY = 4, 8, 9
# The struct letters of the types of metadata.
_LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


class _Encoding(NamedTuple):
    """How values are stored: a dtype, or blocks of so many values in so many bytes."""

    name: str
    dtype: str
    values: int
    bytes: int


# By ggml's number. `fetch` gives quantised values in float32, which holds them exactly.
ENCODINGS = {
    0: _Encoding("F32", "float32", 1, 4),
    1: _Encoding("F16", "float16", 1, 2),
    2: _Encoding("Q4_0", "", 32, 18),
    3: _Encoding("Q4_1", "", 32, 20),
    6: _Encoding("Q5_0", "", 32, 22),
    7: _Encoding("Q5_1", "", 32, 24),
    8: _Encoding("Q8_0", "", 32, 34),
    10: _Encoding("Q2_K", "", 256, 84),
    11: _Encoding("Q3_K", "", 256, 110),
    12: _Encoding("Q4_K", "", 256, 144),
    13: _Encoding("Q5_K", "", 256, 176),
    14: _Encoding("Q6_K", "", 256, 210),
    30: _Encoding("BF16", "bfloat16", 1, 2),
}
# Blocks that a scheme of ours holds bit for bit: Q4_0 is 32 values of 4 bits, each scale * (q - 8).
KEPT = {"Q4_0": "q4_32"}
_UNREAD = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


class _Stored(NamedTuple):
    """Where a tensor is in the file; the shape is the row-major one."""

    shape: tuple[int, ...]
    encoding: _Encoding
    start: int
    size: int


class GGUFReader(Reader):
    """A `.gguf` file; what is not quantised is a view of the mapped file.

    Quantised tensors are bfloat16 unless another dtype is asked for, and so are all matrices with
    which a model computes beside them.

    Raises:
      DamagedError: The file is cut short, or is no GGUF.
      UnknownFormatError: Tensors have an encoding that is not read.
    """

    format = Format.GGUF

    def _open(self) -> None:
        try:
            self._mapped = MappedFile(self.path)
            header = _Header(self._mapped.data)
        except (struct.error, KeyError, ValueError, TypeError, ArithmeticError) as error:
            raise DamagedError(
                f"{self.path} is cut short or no GGUF: its header cannot be read ({error})"
            ) from error
        self._metadata, self._stored = header.metadata, header.stored
        if header.unread:
            unread = [
                f"{what} in {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}"
                for what, names in header.unread.items()
            ]
            known = ", ".join(encoding.name for encoding in ENCODINGS.values())
            raise UnknownFormatError(
                f"{self.path}: the encodings that are read are {known}; got {', '.join(unread)}"
            )
        end = max((tensor.start + tensor.size for tensor in self._stored.values()), default=0)
        if end > len(self._mapped):
            raise DamagedError(
                f"{self.path} is cut short: it must have {end} bytes, got {len(self._mapped)}"
            )
        self.tensors = {
            name: Tensor(tensor.shape, DTYPES[tensor.encoding.dtype or "bfloat16"])
            for name, tensor in self._stored.items()
        }
        self.homes = around(self.path)

    @functools.cached_property
    def stated(self) -> Any:
        return config_from_metadata(self.path, self._metadata, self.tensors)

    def fetch(self, name: str) -> np.ndarray:
        shape, encoding, start, size = self._stored[name]
        if encoding.dtype:
            return self._mapped.read(start, DTYPES[encoding.dtype], shape)
        try:
            library = importlib.import_module("gguf")
        except ImportError as error:
            what = f"reading {encoding.name} from a GGUF"
            raise MissingExtraError(what, "gguf", "'recurrentgemma[gguf]'") from error
        count = math.prod(shape[:-1])
        rows = self._mapped.read(start, np.dtype(np.uint8), (count, size // max(count, 1)))
        kind = library.GGMLQuantizationType[encoding.name]
        return library.dequantize(rows, kind).reshape(shape)

    def _common(self, dtypes: Iterable[np.dtype]) -> np.dtype:
        found = set(dtypes)
        quantised = not all(tensor.encoding.dtype for tensor in self._stored.values())
        return DTYPES["bfloat16"] if quantised and len(found) > 1 else super()._common(found)

    def stored_in(self, spec: ParamSpec) -> str | None:
        """The scheme that holds a matrix as it is stored: the blocks of its rows, in any order."""
        stored = [self._stored[piece.name] for piece in self.layout.pieces[spec.path]]
        whole = all(tensor.shape[-1] % tensor.encoding.values == 0 for tensor in stored)
        schemes = {KEPT.get(tensor.encoding.name) for tensor in stored}
        kept = spec.matrix and whole and len(schemes) == 1 and self.layout.in_rows(spec)
        return schemes.pop() if kept else None

    def fetch_quantized(self, name: str) -> Sequence[np.ndarray]:
        """The values of a tensor in Q4_0, two a byte in our order, and its scales and zeros."""
        shape, encoding, start, _ = self._stored[name]
        places = *shape[:-1], shape[-1] // encoding.values, encoding.bytes
        blocks = self._mapped.read(start, np.dtype(np.uint8), places)
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
        lower, upper = blocks[..., 2:] & 15, blocks[..., 2:] >> 4  # the first 16 values, the others
        values = np.concatenate([pack(lower), pack(upper)], -1).reshape(*shape[:-1], -1)
        return values, scale, np.full(scale.shape, 8, np.int8)

    @property
    def tokenizer(self) -> Path | None:
        return self.path if "tokenizer.ggml.tokens" in self._metadata else super().tokenizer

    def load_tokenizer(self) -> Tokenizer:
        if "tokenizer.ggml.tokens" not in self._metadata:
            return super().load_tokenizer()
        return Tokenizer(sentencepiece_model(self.path, self._metadata))


class _Header:
    """The metadata and the places of tensors.

    Attributes:
      metadata: The values, by key.
      stored: The tensors, by name.
      unread: The encodings that are not read, each with its tensors.
    """

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0
        if bytes(data[:4]) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, tensors, entries = self._numbers("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version must be 2 or 3, got {version}")
        self.metadata = {self._string(): self._value(*self._numbers("I")) for _ in range(entries)}
        infos = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        base = -(-self._at // alignment) * alignment
        self.stored, self.unread = dict[str, _Stored](), dict[str, list[str]]()
        for name, shape, kind, offset in infos:
            encoding = ENCODINGS.get(kind)
            if encoding is None:
                self.unread.setdefault(_UNREAD.get(kind, f"type {kind}"), []).append(name)
                continue
            size = math.prod(shape) // encoding.values * encoding.bytes
            self.stored[name] = _Stored(shape, encoding, base + offset, size)

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{letters}", self._data, self._at)
        self._at += struct.calcsize(f"<{letters}")
        return found

    def _string(self) -> str:
        (size,) = self._numbers("Q")
        if self._at + size > len(self._data):
            raise ValueError("a text ends beyond the file")
        self._at += size
        return str(self._data[self._at - size : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(_LETTERS[kind])[0]
        kind, length = self._numbers("IQ")
        if length > len(self._data):
            raise ValueError("an array ends beyond the file")
        if kind in (_STRING, _ARRAY):
            return [self._value(kind) for _ in range(length)]
        return list(self._numbers(f"{length}{_LETTERS[kind]}"))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (rank,) = self._string(), self._numbers("I")
        if rank > _DIMENSIONS:
            raise ValueError(f"{name} must have at most {_DIMENSIONS} axes, got {rank}")
        shape = self._numbers(f"{rank}Q")[::-1]
        kind, offset = self._numbers("IQ")
        return name, shape, kind, offset
