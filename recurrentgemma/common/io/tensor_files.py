"""safetensors files, read in place and written a tensor at a time.

Beside the library `safetensors`: bfloat16 as NumPy arrays that are views of the mapped file, and
files larger than memory. Layout: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.arrays import DTYPES, Stacked, pieces

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
DTYPE_NAMES = {DTYPES[name]: stored for name, stored in _NAMES.items()}
_DTYPES = {stored: dtype for dtype, stored in DTYPE_NAMES.items()}
# Of tensors that are no parameters of ours: known, so that they can be named.
_OTHER = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4}
_OTHER |= {"U32": 4, "I64": 8, "U64": 8}
_LONGEST_HEADER = 100_000_000  # as in the library
_WRITE = 1 << 16  # bytes at a time; with more, Linux can take two to four times as long


class TensorInfo(NamedTuple):
    """A stored tensor.

    Attributes:
      shape: Its shape.
      dtype: Its dtype; None for one that is no floating-point type.
      offset: Where its bytes are in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | None
    offset: int


class TensorFile:
    """A safetensors file, its tensors not read before they are used.

    Attributes:
      path: The file.
      tensors: What it holds, by name.
      metadata: What its header says beside them.

    Raises:
      DamagedError: It is no safetensors file, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = _read_header(path)
        self._map: mmap.mmap | None = None

    def read(self, name: str) -> np.ndarray:
        """A tensor as a view of the file; writing to it changes a private copy."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        info = self.tensors[name]
        assert info.dtype is not None  # readers refuse a file with such tensors before
        flat = np.frombuffer(self._map, info.dtype, math.prod(info.shape), info.offset)
        return flat.reshape(info.shape)


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise DamagedError(f"{path} is no complete safetensors file: {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise TypeError(f"a JSON object is expected, got {type(header).__name__}")
        metadata = dict(header.pop("__metadata__", None) or {})
        entries = {name: _entry(value) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(f"{path}: its header is damaged: {error!r}") from error
    start, end = 8 + length, 0
    for name, (_, _, (begin, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if begin != end:
            raise DamagedError(f"{path}: {name} must begin at byte {end}, its header says {begin}")
        end = stop
    if start + end != size:
        raise DamagedError(
            f"{path} is no complete safetensors file: {start + end} bytes are expected, got {size}"
        )
    tensors = {
        name: TensorInfo(shape, dtype, start + begin)
        for name, (shape, dtype, (begin, _)) in entries.items()
    }
    return tensors, metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _entry(value: Any) -> tuple[tuple[int, ...], np.dtype | None, tuple[int, int]]:
    shape, name, (begin, end) = value["shape"], value["dtype"], value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"sizes must be integers of at least 0, got {value}")
    dtype = _DTYPES.get(name)
    itemsize = _OTHER.get(name) if dtype is None else dtype.itemsize
    if itemsize is None:
        raise ValueError(f"unknown dtype {name!r}")
    if end - begin != math.prod(shape) * itemsize:
        raise ValueError(f"a {name} tensor of shape {shape} cannot take {end - begin} bytes")
    return tuple(shape), dtype, (begin, end)


class TensorFileWriter(contextlib.AbstractContextManager["TensorFileWriter"]):
    """Writes a safetensors file whose tensors come one at a time, in the order declared.

    The file is deleted if the `with` block raises.

    Args:
      path: The file.
      tensors: Shape and dtype of each tensor, by name.
      metadata: Kept in the header.
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
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)  # tensors are as aligned as they can be
        self._path, self._tensors = path, dict(tensors)
        self._pending = list(tensors)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray | Stacked) -> None:
        """Writes the next tensor, cast to the declared dtype."""
        shape, dtype = self._tensors[name]
        if self._pending.pop(0) != name or array.shape != shape:
            raise AssertionError(f"{name} {array.shape} is not the tensor declared next")
        write_array(self._file, array, dtype)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert not self._pending
            self._file.close()
            return
        with contextlib.suppress(OSError):  # such as a full disk, once more
            self._file.close()
        self._path.unlink()


def write_array(file: Any, array: np.ndarray | Stacked, dtype: np.dtype | None = None) -> None:
    """Writes the bytes of an array's values in C order, cast to `dtype` if that is given."""
    for piece in pieces(array, dtype):
        data = piece.view(np.uint8).data
        for i in range(0, len(data), _WRITE):
            file.write(data[i : i + _WRITE])
