"""Arrays that are too large to copy: checked, compared and cast a piece at a time.

bfloat16 is the NumPy type of `ml_dtypes`, here and in every reader and writer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from recurrentgemma.common.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {  # of parameters, in every format
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# Tensor files may also hold these: quantised values, shapes, and the counts and bits of states.
INTEGERS = {name: np.dtype(name) for name in ("int8", "uint8", "int32", "int64")}
_VECTOR = 1 << 18  # values in a piece of a vector
_SMALL = 1 << 15  # an array of no more values is one piece, whatever its strides
_STRIP = 128  # rows in a piece of a matrix: it stays in the cache while it is cast or transposed
_TILE = 64  # columns of a strip that are transposed at a time


def dtype_name(dtype: object) -> str:
    """NumPy's name for a dtype of NumPy, JAX or PyTorch."""
    return str(dtype).removeprefix("torch.")


def float_dtype(dtype: object) -> np.dtype:
    """The NumPy dtype for a floating-point dtype of NumPy, JAX or PyTorch.

    Raises:
      ValueError: Parameters cannot have this dtype.
    """
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


class Stacked:
    """Arrays of one shape and dtype as the rows of one array, which NumPy makes when it needs it.

    Attributes:
      shape: The shape of the whole array.
      dtype: The dtype of every row.
    """

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self._rows = rows
        self.shape, self.dtype = (len(rows), *rows[0].shape), rows[0].dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A row; for a slice, an array of several rows."""
        rows = self._rows[index]
        return np.asarray(Stacked(rows)) if isinstance(index, slice) else rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole array; its rows keep the order of their axes in memory."""
        order = _order(self._rows[0])
        whole = np.stack([row.transpose(order) for row in self._rows])
        whole = whole.transpose(0, *(1 + np.argsort(order)))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def reshape(self, shape: tuple[int, ...]) -> np.ndarray | Stacked:
        return self if shape == self.shape else np.asarray(self).reshape(shape)


def pieces(array: np.ndarray | Stacked, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
    """The values of an array in C order, as flat contiguous pieces.

    Args:
      array: The array; it may have any strides.
      dtype: Each piece is cast to this dtype (`cast`); None leaves it as it is.
    """
    if isinstance(array, Stacked):
        return itertools.chain.from_iterable(pieces(row, dtype) for row in array)
    return (_flat(part, dtype) for (part,) in _parts(array))


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another floating-point dtype: to nearest, ties to even, overflow to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        if array.dtype == np.float64 and dtype == BFLOAT16:
            return _to_bfloat16(array)
        return array.astype(dtype, copy=False)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float64 to bfloat16 with one rounding: through float32, rounded to odd."""
    near = array.astype(np.float32)
    bits = near.view(np.uint32)
    with np.errstate(invalid="ignore"):
        inexact = near.astype(np.float64) != array
        beyond = np.abs(near.astype(np.float64)) > np.abs(array)
    toward_zero = np.where(inexact & beyond & np.isfinite(array), bits - 1, bits)
    odd = np.where(inexact & np.isfinite(array), toward_zero | 1, bits)
    return odd.astype(np.uint32).view(np.float32).astype(BFLOAT16)


def count_nonfinite(array: np.ndarray | Stacked, dtype: np.dtype | None = None) -> int:
    """How many values are NaN or infinite, after a cast to `dtype` if that is given."""
    if isinstance(array, Stacked):
        return sum(count_nonfinite(row, dtype) for row in array)
    dtype = array.dtype if dtype is None else dtype
    if dtype in INTEGERS.values():
        return 0
    infinity = dtype.type(np.inf)
    mask = infinity.view(f"u{infinity.itemsize}")
    return sum(
        int(np.count_nonzero((_bits(values) & mask) == mask))
        for values in pieces(array.transpose(_order(array)), dtype)
    )


def same_bits(
    one: np.ndarray | Stacked, other: np.ndarray | Stacked, dtype: np.dtype | None = None
) -> bool:
    """Whether two arrays have the same shape, dtype and bits (NaNs too).

    Args:
      one: An array.
      other: Another array.
      dtype: `one` is cast to this dtype first; None leaves it as it is.
    """
    if one.shape != other.shape or (one.dtype if dtype is None else dtype) != other.dtype:
        return False
    if isinstance(one, Stacked) or isinstance(other, Stacked):
        return all(same_bits(a, b, dtype) for a, b in zip(one, other, strict=True))
    order = _order(one)
    pairs = _parts(one.transpose(order), other.transpose(order))
    return all(np.array_equal(_bits(_flat(a, dtype)), _bits(_flat(b))) for a, b in pairs)


def _parts(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Views of arrays of one shape, all cut in the same way, in C order."""
    if all(array.flags.c_contiguous for array in arrays):
        arrays = tuple(array.reshape(-1) for array in arrays)
    if arrays[0].size <= _SMALL:
        yield arrays
    elif arrays[0].ndim > 2:
        for rows in zip(*arrays, strict=True):
            yield from _parts(*rows)
    else:
        step = _STRIP if arrays[0].ndim == 2 else _VECTOR
        for i in range(0, len(arrays[0]), step):
            yield tuple(array[i : i + step] for array in arrays)


def _flat(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """The values of an array in C order, cast to `dtype` if that is given."""
    if array.ndim == 2 and array.strides[1] != array.itemsize:
        # As integers: NumPy is slow to move values of types that are not its own.
        array = _transposed(_bits(array)).view(array.dtype)
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat if dtype is None else cast(flat, dtype)


def _transposed(strip: np.ndarray) -> np.ndarray:
    """Contiguous rows of a transposed matrix, copied a tile at a time: a tile fits the cache."""
    result = np.empty(strip.shape, strip.dtype)
    for i in range(0, strip.shape[1], _TILE):
        result[:, i : i + _TILE] = strip[:, i : i + _TILE]
    return result


def _order(array: np.ndarray) -> list[int]:
    """The array's axes in their order in memory."""
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.itemsize}"))
