"""Matrices in fewer bytes: the schemes, what they store, and how to compute with it.

This is the definition; `{jax,torch}/products.py` compute with it. A matrix W, [K, N] with K inputs
and N outputs, is stored as rows of outputs, [N, K], however its framework holds it:

    q8     int8, symmetric: one scale for each output
    q4     4 bits, asymmetric: groups of 128 inputs, each with a scale and a zero
    q4_32  4 bits, asymmetric: groups of 32 inputs

and W[k, n] is about scale[n, g] * (value[n, k] - zero[n, g]) in the group g of k. A matrix with
fewer inputs than a group has is one group. The table of embeddings, [V, D], is `q8` in every
scheme, with a scale for each row, which is an output of the model's head. `ParamSpec.matrix` and
`ParamSpec.table` say which parameters are quantised: no norm, bias, convolution or `a_param` is.

A product has three forms. Where `Quantized.integer` is set, the device chooses; where it is not,
as under adapters, every product takes the third:

    integer      the rows of x are quantised, too (`quantize_rows`); y = (x_q W_q) * scale_x *
                 scale_w, with sums in int32 that are equal to the bit in both twins: `q8` on a CPU
                 or TPU
    as stored    y = sum over groups g of (x_g (value_g - zero_g)) * scale_g, with sums in float32
                 whose order does not depend on the number of rows: up to 16 rows on one NVIDIA GPU
    dequantised  y = x (scale * (value - zero)), the matrix in the dtype of x

All have the derivative of the dequantised form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.model.params import ParamSpec

LARGEST = 127  # the int8 range is symmetric
_MOST = 15  # of a 4-bit value
_STRIP = 1 << 22  # values that are quantised at a time


class Scheme(NamedTuple):
    """How a matrix is stored.

    Attributes:
      bits: Bits of a value: 8, or 4 (two values a byte, the first in the lower half).
      group: Inputs that share a scale; all of them if None.
    """

    bits: int
    group: int | None


SCHEMES = {"q8": Scheme(8, None), "q4": Scheme(4, 128), "q4_32": Scheme(4, 32)}


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix or a stack of matrices in a scheme; the arrays may be of any framework.

    Attributes:
      values: int8, [..., N, K]; or two values a byte, uint8, [..., N, K / 2].
      scale: float32, [..., N, G], with G groups.
      zero: int8, [..., N, G]; None where the scheme is symmetric.
      scheme: Its name in `SCHEMES`.
      axis: The axis of inputs in the matrix that this stands for: -2 for [..., K, N], -1 for
        [..., N, K].
      dtype: The name of the dtype that the matrix has in a computation.
      integer: Whether the device chooses the form of a product; if not, it is dequantised.
    """

    values: Any
    scale: Any
    zero: Any
    scheme: str
    axis: int = -2
    dtype: str = "float32"
    integer: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""
        *stack, rows, stored = self.values.shape
        inputs = stored * 8 // SCHEMES[self.scheme].bits
        return (*stack, rows, inputs) if self.axis == -1 else (*stack, inputs, rows)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.values.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def parts(self) -> dict[str, Any]:
        """The arrays, by their names behind the parameter's own: "" for the values."""
        parts = {"": self.values, ".scale": self.scale, ".zero": self.zero}
        return {name: part for name, part in parts.items() if part is not None}

    def with_parts(self, change: Callable[[Any], Any]) -> Quantized:
        """The same with other arrays, each made from the array in its place."""
        values, scale = change(self.values), change(self.scale)
        zero = None if self.zero is None else change(self.zero)
        return dataclasses.replace(self, values=values, scale=scale, zero=zero)

    def replace(self, **changes: Any) -> Quantized:
        """The same with other fields."""
        return dataclasses.replace(self, **changes)


def require_scheme(scheme: str) -> str:
    """The name of a scheme itself, or `ValueError`."""
    if scheme not in SCHEMES:
        raise UserError(f"quantize must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    return scheme


def scheme_for(spec: ParamSpec, scheme: str | None) -> str | None:
    """The scheme of one parameter in a model of a scheme; None if it is not quantised."""
    if scheme is None or not (spec.matrix or spec.table):
        return None
    return "q8" if spec.table else require_scheme(scheme)


def input_axis(spec: ParamSpec) -> int:
    """The axis of inputs of a parameter in the Flax layout."""
    return -1 if spec.table else -2


def scheme_of(values: Iterable[Any]) -> str | None:
    """The scheme of a model with these parameters; None if no parameter is `Quantized`.

    Raises:
      ValueError: They are in several.
    """
    found = {value.scheme for value in values if isinstance(value, Quantized)}
    found = found - {"q8"} or found  # in every scheme the embedding is q8
    if len(found) > 1:
        raise UserError(f"a model is quantised in one scheme, got {', '.join(sorted(found))}")
    return found.pop() if found else None


def part_shapes(
    shape: tuple[int, ...], scheme: str, axis: int = -2, name: str = "the matrix"
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each of `Quantized.parts`.

    Raises:
      ValueError: The groups do not divide the inputs.
    """
    bits, size = SCHEMES[require_scheme(scheme)]
    inputs = shape[axis]
    rows = (*shape[:-2], shape[-3 - axis])
    group = min(size or inputs, inputs)
    if inputs % group or inputs * bits % 8:
        fits = f"groups of {group}" if inputs % group else "pairs"
        raise UserError(
            f"{scheme} needs inputs that {fits} divide, got {name} of shape {shape} with "
            f"{inputs} inputs"
        )
    scales = (*rows, inputs // group)
    values = np.dtype("int8" if bits == 8 else "uint8")
    parts: dict[str, tuple[tuple[int, ...], np.dtype]] = {"": ((*rows, inputs * bits // 8), values)}
    parts[".scale"] = (scales, np.dtype(np.float32))
    if bits == 4:
        parts[".zero"] = (scales, np.dtype(np.int8))
    return parts


def spec_parts(spec: ParamSpec, scheme: str | None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """`part_shapes` of a parameter in a model of a scheme, which quantises it."""
    name = scheme_for(spec, scheme)
    assert name is not None
    return part_shapes(spec.shape, name, input_axis(spec), spec.path)


def quantized_bytes(shape: tuple[int, ...], scheme: str = "q8", axis: int = -2) -> int:
    """Bytes of a quantised matrix or stack of this shape."""
    return _bytes(part_shapes(shape, scheme, axis))


def stored_bytes(spec: ParamSpec, size: int, scheme: str | None) -> int:
    """Bytes of a parameter in a model of a scheme, or of so many bytes a value without one."""
    if scheme_for(spec, scheme) is None:
        return size * spec.size
    return _bytes(spec_parts(spec, scheme))


def _bytes(parts: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())


def quantize_parameter(spec: ParamSpec, value: Any, scheme: str | None) -> Any:
    """A parameter in the Flax layout as a model of a scheme holds it: `Quantized`, or as it is."""
    name = scheme_for(spec, scheme)
    if name is None or isinstance(value, Quantized):
        return value
    return quantize(value, name, input_axis(spec), spec.path)


def quantize(
    matrix: Any, scheme: str = "q8", axis: int = -2, name: str = "the matrix"
) -> Quantized:
    """Rounds a stack of matrices to a scheme; ties go to the even value.

    q8: scale = max |w| / 127 and value = round(w / scale), over the inputs of an output. 4 bits:
    scale = (high - low) / 15, zero = round(-low / scale) and value = round(w / scale) + zero, where
    low and high are the least and the largest of a group's values and 0. It works on a strip of
    outputs at a time: beside the result it needs little memory.

    Args:
      matrix: [..., K, N], or [..., N, K] where the axis of inputs is -1.
      scheme: The name of the scheme.
      axis: The axis of inputs.
      name: The parameter, for messages.

    Raises:
      ValueError: The groups do not divide the inputs.
    """
    parts = part_shapes(tuple(matrix.shape), scheme, axis, name)
    result = {part: np.zeros(shape, dtype) for part, (shape, dtype) in parts.items()}
    dtype = matrix.dtype.name if matrix.dtype in DTYPES.values() else "float32"
    quantized = Quantized(result[""], result[".scale"], result.get(".zero"), scheme, axis, dtype)
    for index in np.ndindex(tuple(matrix.shape[:-2])):
        # A matrix at a time, for a stack of files' views, too.
        rows = np.asarray(functools.reduce(operator.getitem, index, matrix))
        rows = rows if axis == -1 else rows.swapaxes(0, 1)
        step = max(_STRIP // rows.shape[1], 1)
        for start in range(0, len(rows), step):
            strip = np.asarray(rows[start : start + step], np.float32, order="C")
            groups = strip.reshape(len(strip), quantized.scale.shape[-1], -1)
            place = (*index, slice(start, start + step))
            _quantize_groups(groups, quantized, place)
    return quantized


def _quantize_groups(groups: np.ndarray, result: Quantized, place: tuple[Any, ...]) -> None:
    """Writes groups of values, [rows, G, K / G], to a place of a result."""
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if result.zero is None:
        scale = np.maximum(-low, high) / np.float32(LARGEST)
    else:
        scale = (high - low) / np.float32(_MOST)
    result.scale[place] = scale
    if not np.isfinite(scale).all():  # nor are the values: the scale tells
        return
    steps = np.where(scale > 0, scale, np.float32(1))
    values = np.rint(groups / steps[..., None])
    if result.zero is None:
        result.values[place] = values.reshape(len(values), -1)
        return
    zero = np.rint(-low / steps)
    values = np.clip(values + zero[..., None], 0, _MOST).astype(np.uint8)
    result.zero[place] = zero
    result.values[place] = pack(values.reshape(len(values), -1))


def pack(values: Any) -> Any:
    """Two 4-bit values a byte, the first in the lower half: [..., K] to [..., K / 2]."""
    return values[..., ::2] | values[..., 1::2] << 4


def unpack(values: Any, stack: Callable[..., Any] = np.stack) -> Any:
    """The inverse of `pack`; `stack` is the framework's."""
    return stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)


def dequantize(quantized: Quantized, stack: Callable[..., Any] = np.stack) -> Any:
    """The matrices in float32 and in their own layout; `stack` is the framework's.

    Both are in the framework of the arrays.
    """
    values, scale = quantized.values, quantized.scale
    if SCHEMES[quantized.scheme].bits == 4:
        values = unpack(values, stack)
    groups = values.reshape(*scale.shape, -1)
    if quantized.zero is not None:
        groups = groups - quantized.zero[..., None]  # int16, from uint8 and int8
    rows = (groups * scale[..., None]).reshape(values.shape)
    return rows if quantized.axis == -1 else rows.swapaxes(-1, -2)


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of x, [..., K], as int8, and their scales in float32, [..., 1].

    scale = max |x| * (1 / 127) and value = round(x * (127 / max |x|)), in float32; ties go to the
    even value, and a row of zeros stays one.
    """
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(-1, keepdims=True)
    inverse = np.float32(LARGEST) / np.where(largest > 0, largest, np.float32(np.inf))
    return np.rint(x * inverse).astype(np.int8), largest * np.float32(1 / LARGEST)


def integer_sums(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """x W^T in int32, of int8 arrays [..., M, K] and [..., N, K]."""
    # In float64, which holds the sums exactly and which NumPy multiplies quickly.
    sums = x.astype(np.float64) @ values.astype(np.float64).swapaxes(-1, -2)
    return sums.astype(np.int32)


def product(x: np.ndarray, w: Quantized) -> np.ndarray:
    """x W of rows [..., M, K] in the form that `w.integer` says, in float32."""
    if not (w.integer and w.scheme == "q8"):
        matrix = dequantize(w)
        return np.asarray(x, np.float32) @ (matrix if w.axis == -2 else matrix.swapaxes(-1, -2))
    values, scale = quantize_rows(x)
    sums = integer_sums(values, w.values).astype(np.float32)
    return sums * scale * w.scale.swapaxes(-1, -2)
