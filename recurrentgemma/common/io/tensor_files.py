"""safetensors files: tensors are read as views of the mapped file, and written one at a time.

The library `safetensors` checks a file. It copies each tensor that it reads, does not say where a
tensor lies, and writes only what is in memory as a whole: these parts are here.
Layout: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.arrays import DTYPES, INTEGERS, Stacked, pieces
from recurrentgemma.common.io.mapped import MappedFile

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_NAMES |= {"int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}
DTYPE_NAMES = {(DTYPES | INTEGERS)[name]: stored for name, stored in _NAMES.items()}
_DTYPES = {stored: dtype for dtype, stored in DTYPE_NAMES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the library's limit
_WRITE = 1 << 16  # bytes at a time; with more, Linux can take two to four times as long


class TensorInfo(NamedTuple):
    """A stored tensor.

    Attributes:
      shape: Its shape.
      dtype: Its dtype, one of `DTYPE_NAMES`; None for any other, which cannot be read.
      offset: The position of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    offset: int


class TensorFile:
    """A safetensors file; a tensor's bytes are read when they are used.

    Attributes:
      path: The file.
      tensors: Its tensors, by name.
      metadata: The header's strings, by name.

    Raises:
      DamagedError: It is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        start, header = _read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
            self.tensors[name] = TensorInfo(shape, _DTYPES.get(entry["dtype"]), offset)
        self._mapped: MappedFile | None = None

    def read(self, name: str) -> np.ndarray:
        """A tensor as a view of the file; what is written to it lasts as long as the array.

        Raises:
          DamagedError: Tensors of its dtype cannot be read.
        """
        if self._mapped is None:
            self._mapped = MappedFile(self.path, writable=True)
        info = self.tensors[name]
        if info.dtype is None:
            readable = ", ".join(_DTYPES)
            raise DamagedError(f"{self.path}: the dtype of {name} must be one of {readable}")
        return self._mapped.read(info.offset, info.dtype, info.shape)


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a file's tensors start, and its header, once the library has checked both."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(min(start - 8, _LONGEST_HEADER))
    try:
        with safe_open(path, "numpy"):
            return start, json.loads(text)
    except SafetensorError as error:
        # Shortened: the library may repeat a name of any length.
        reason = _wrong_size(path, start, text) or str(error)[:200]
        raise DamagedError(f"{path} is no complete safetensors file: {reason}") from error


def _wrong_size(path: Path, start: int, text: bytes) -> str | None:
    """The size that a header promises and the file's own, if they differ."""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        expected = start + max((entry["data_offsets"][1] for entry in entries), default=0)
        size = path.stat().st_size
        return None if expected == size else f"{expected} bytes are expected, got {size}"


class TensorFileWriter(contextlib.AbstractContextManager["TensorFileWriter"]):
    """Writes a safetensors file whose tensors come one at a time, in the order declared.

    It is a context manager: a block that fails leaves no file.

    Args:
      path: The file.
      tensors: Shape and dtype of each tensor, by name.
      metadata: Strings for the header, by name.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (shape, dtype) in tensors.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            place = {"shape": list(shape), "data_offsets": [begin, end]}
            header[name] = {"dtype": DTYPE_NAMES[dtype], **place}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)  # the first tensor is aligned for any dtype
        self._tensors = dict(tensors)
        self._pending = list(tensors)
        self._path = path
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray | Stacked) -> None:
        """Writes the next tensor, cast to the declared dtype; integers are not cast."""
        shape, dtype = self._tensors[name]
        integer = array.dtype != dtype and dtype in INTEGERS.values()
        if self._pending.pop(0) != name or array.shape != shape or integer:
            raise AssertionError(f"{name} {array.shape} is not the tensor declared next")
        write_array(self._file, array, dtype)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._discard)
            if kind is None:
                assert not self._pending
                self._file.close()
                on_failure.pop_all()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file of arrays that are in memory."""
    declared = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with TensorFileWriter(path, declared, metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def write_array(file: Any, array: np.ndarray | Stacked, dtype: np.dtype | None = None) -> None:
    """Writes the bytes of an array's values in C order, cast to `dtype` if that is given."""
    for piece in pieces(array, dtype):
        data = piece.view(np.uint8).data
        for i in range(0, len(data), _WRITE):
            file.write(data[i : i + _WRITE])
