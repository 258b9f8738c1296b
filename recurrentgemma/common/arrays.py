"""Arrays too large to copy: looked at and passed on a piece at a time.

bfloat16 is `ml_dtypes`' NumPy type, here and in every reader and writer.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_EXPONENT = {
    BFLOAT16: 0x7F80,
    DTYPES["float16"]: 0x7C00,
    DTYPES["float32"]: 0x7F80_0000,
    DTYPES["float64"]: 0x7FF0_0000_0000_0000,
}
_PIECE = 1 << 19  # bytes: a piece and its cast or transpose stay in the cache
_STRIP = 64  # columns of a matrix that is transposed, read together


def pieces(array: np.ndarray, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
    """The values of an array in C order, as flat contiguous pieces.

    Args:
      array: Of any strides.
      dtype: Each piece is cast to it, to nearest, ties to even; as it is if None.
    """
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(1, _PIECE // array.itemsize)
        parts = (flat[i : i + step] for i in range(0, flat.size, step))
    elif array.ndim > 2 or _is_row_wise(array):
        parts = (part for row in array for part in pieces(row))
    else:
        # Rows of a transposed matrix. Its strip is copied as it lies, then turned in the cache:
        # three times as fast as NumPy turning it out of memory.
        parts = (
            np.ascontiguousarray(np.ascontiguousarray(array[i : i + _STRIP].T).T).reshape(-1)
            for i in range(0, len(array), _STRIP)
        )
    for part in parts:
        yield part if dtype is None or part.dtype == dtype else cast(part, dtype)


def _is_row_wise(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.strides[-1] == array.itemsize


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another floating-point dtype: to nearest, ties to even, overflow to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        if array.dtype == np.float64 and dtype == BFLOAT16:
            return _to_bfloat16(array)
        return array.astype(dtype, copy=False)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float64 to bfloat16 with one rounding: by way of float32, rounded to odd."""
    near = array.astype(np.float32)
    bits = near.view(np.uint32)
    with np.errstate(invalid="ignore"):
        inexact = near.astype(np.float64) != array
        beyond = np.abs(near.astype(np.float64)) > np.abs(array)
    toward_zero = np.where(inexact & beyond & np.isfinite(array), bits - 1, bits)
    odd = np.where(inexact & np.isfinite(array), toward_zero | 1, bits)
    return odd.astype(np.uint32).view(np.float32).astype(BFLOAT16)


def count_nonfinite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    mask = _EXPONENT[array.dtype]
    return sum(
        int(np.count_nonzero((bits & bits.dtype.type(mask)) == mask))
        for bits in map(_bits, pieces(_as_it_lies(array, array)))
    )


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have the same shape, dtype and bits; NaNs compare by their bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pairs = zip(_blocks(_as_it_lies(one, one)), _blocks(_as_it_lies(other, one)), strict=True)
    return all(np.array_equal(_bits(a), _bits(b)) for a, b in pairs)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The values in C order, contiguous: for one shape the same blocks whatever the strides."""
    if array.ndim > 2:
        for row in array:
            yield from _blocks(row)
    elif array.ndim < 2:
        for i in range(0, len(array), _PIECE):
            yield np.ascontiguousarray(array[i : i + _PIECE])
    else:
        for i in range(0, len(array), _STRIP):
            strip = array[i : i + _STRIP]
            if not _is_row_wise(strip):
                strip = np.ascontiguousarray(strip.T).T
            yield np.ascontiguousarray(strip)


def _as_it_lies(array: np.ndarray, model: np.ndarray) -> np.ndarray:
    """The array with its axes in the order in which those of `model` lie in memory."""
    order = sorted(range(model.ndim), key=lambda axis: -model.strides[axis])
    return array.transpose(order)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.itemsize}"))
