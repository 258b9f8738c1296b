"""Products with stored matrices: the one way through which every layer multiplies.

`torch.quantization` makes the matrices that are in fewer bytes; `common.quantization` defines what
they mean.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor
from torch.nn.functional import embedding, linear

from recurrentgemma.common.quantization import LARGEST, dequantize
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime.arrays import without_autocast

_PART_ELEMENTS = 2**19  # of a part of a wide matrix, which then stays in the processor's cache
_EXACT = 1024  # products of two int8 values whose sum float32 holds exactly


def dense(w: Tensor | QuantizedMatrix) -> Tensor:
    """The tensor itself, or the matrix that a `QuantizedMatrix` stands for, in its dtype."""
    if isinstance(w, QuantizedMatrix):
        return dequantize(w.quantized, torch.stack).to(w.dtype)
    return w


def lookup(w: Tensor | QuantizedMatrix, index: Int[Tensor, "..."]) -> Shaped[Tensor, "... d"]:
    """The rows of a table."""
    if isinstance(w, QuantizedMatrix):
        rows = w.quantized.with_parts(lambda part: part[index])
        return dequantize(rows, torch.stack).to(w.dtype)
    return embedding(index, w)


def product(
    x: Float[Tensor, "*b k"],
    w: Tensor | QuantizedMatrix,
    bias: Tensor | None = None,
    *,
    axis: int = -2,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*c n"]:
    """x W + b for a matrix, [K, N], or for each matrix of a stack, [C, K, N].

    A matrix takes any x, [..., K]. A stack takes rows for each of its matrices, [C, Z, K], or the
    same rows for all, [1, Z, K], and gives [C, Z, N].

    A `QuantizedMatrix` whose `integer` is set quantises the rows of x; any other is dequantised
    (see `common.quantization`).

    Args:
      x: The rows, in the dtype of the matrix; or in `dtype`.
      w: The matrix or stack.
      bias: Added; it broadcasts to the result.
      axis: The axis of inputs of `w`: -2, or -1 where it is [..., N, K].
      dtype: The dtype in which products are summed, and of the result; that of x if None.
    """
    if isinstance(w, QuantizedMatrix) and w.integer and w.scheme == "q8":
        y = _integer_product(x, w).to(dtype or x.dtype)
        return y if bias is None else y + bias
    return _product(x, dense(w), bias, axis, dtype)


def _product(
    x: Tensor, w: Tensor, bias: Tensor | None, axis: int, dtype: torch.dtype | None
) -> Tensor:
    if w.ndim > 2:
        w = w if axis == -2 else w.mT
        x = x.expand(len(w), -1, -1)
        return x @ w if bias is None else torch.baddbmm(bias, x, w)
    w = w.T if axis == -2 else w
    if dtype is None:
        return linear(x, w, bias)
    # In parts, since in a narrower dtype each is copied to the wide one.
    parts = [w] if w.dtype == dtype else w.split(max(_PART_ELEMENTS // x.shape[-1], 1))
    with without_autocast(x.device):
        y = [linear(x.to(dtype), part.to(dtype)) for part in parts]
    y = torch.cat(y, -1) if len(y) > 1 else y[0]
    return y if bias is None else y + bias


def _integer_product(x: Tensor, w: QuantizedMatrix) -> Tensor:
    values, scale = quantize_rows(x)
    sums = integer_sums(values, w.values).float()
    return sums * scale * w.scale.mT


def quantize_rows(x: Float[Tensor, "*b k"]) -> tuple[Int8[Tensor, "*b k"], Float[Tensor, "*b 1"]]:
    """See `common.quantization.quantize_rows`."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    # A quotient of two tensors, since a number divided by one is rounded twice.
    inverse = torch.full_like(largest, LARGEST) / torch.where(largest > 0, largest, torch.inf)
    return torch.round(x * inverse).to(torch.int8), largest * (1 / LARGEST)


def integer_sums(x: Int8[Tensor, "*b k"], values: Int8[Tensor, "*c n k"]) -> Int[Tensor, "*d n"]:
    """See `common.quantization.integer_sums`."""
    sums = torch.zeros((), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[-1], _EXACT):
        part = slice(start, start + _EXACT)
        with without_autocast(x.device):
            products = x[..., part].float() @ values[..., part].float().mT
        sums = sums + products.to(torch.int32)
    return sums
