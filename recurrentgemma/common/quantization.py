"""Matrices in fewer bytes: int8, symmetric, with one scale for each output column.

This is the definition; `{jax,torch}/quantization.py` compute with it. `ParamSpec.matrix` says which
parameters may be quantised.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

_LARGEST = 127  # the int8 range is symmetric


class Quantized(NamedTuple):
    """A stack of matrices: values * scale, in arrays of any framework.

    Attributes:
      values: int8, [..., I, J].
      scale: float32, [..., 1, J].
    """

    values: Any
    scale: Any


def quantize(matrix: np.ndarray) -> Quantized:
    """Rounds to multiples of a column's largest magnitude / 127; ties go to the even multiple."""
    wide = np.asarray(matrix, np.float32)
    scale = np.abs(wide).max(-2, keepdims=True) / np.float32(_LARGEST)
    values = np.rint(wide / np.where(scale > 0, scale, np.float32(1)))
    return Quantized(values.astype(np.int8), scale)


def dequantize(quantized: Quantized) -> Any:
    """The matrices in float32, in the framework of the arrays."""
    return quantized.values * quantized.scale


def quantized_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a quantised stack of matrices of this shape."""
    return math.prod(shape) + 4 * math.prod(shape) // shape[-2]
