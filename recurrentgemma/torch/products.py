"""Products with stored matrices: the one way through which every layer multiplies.

`torch.quantization` makes the matrices that are in fewer bytes; `common.quantization` defines what
they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from recurrentgemma.common.quantization import LARGEST, dequantize
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime import few_rows, kernels
from recurrentgemma.torch.runtime import linear as fast_linear
from recurrentgemma.torch.runtime.arrays import without_autocast
from recurrentgemma.torch.runtime.steps import once_for_rows
from recurrentgemma.torch.runtime.stored import PackedMatrix, takes
from recurrentgemma.torch.scan.gates import forward_levels

_PART_ELEMENTS = 2**20  # of a part of a wide matrix, which then stays in the processor's cache
_MOST = torch.tensor(LARGEST, dtype=torch.float32, device="cpu")
_FEW = 64  # rows; for more, it is faster to dequantise the matrix
_COLUMNS = range(8, 49)  # rows that PyTorch multiplies faster as columns of the other factor
_LEAST = 2**20  # values of such a matrix

Matrix = Tensor | QuantizedMatrix | PackedMatrix
_EXACT = 1024  # products of two int8 values whose sum float32 holds exactly


def dense(w: Matrix) -> Tensor:
    """The tensor itself, or the matrix that another form stands for, in its dtype."""
    if isinstance(w, PackedMatrix):
        return w.values()
    if isinstance(w, QuantizedMatrix):
        return dequantize(w.quantized, torch.stack).to(w.dtype)
    return w


def lookup(w: Matrix, index: Int[Tensor, "..."]) -> Shaped[Tensor, "... d"]:
    """The rows of a table."""
    if isinstance(w, QuantizedMatrix):
        rows = w.quantized.with_parts(lambda part: embedding(index, part))
        return dequantize(rows, torch.stack).to(w.dtype)
    return embedding(index, dense(w))


def product(
    x: Float[Tensor, "*b k"],
    w: Matrix,
    bias: Tensor | None = None,
    *,
    axis: int = -2,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*c n"]:
    """x W + b for a matrix, [K, N], or for each matrix of a stack, [C, K, N].

    A matrix takes any x, [..., K]. A stack takes rows for each of its matrices, [C, Z, K], or the
    same rows for all, [1, Z, K], and gives [C, Z, N].

    A `QuantizedMatrix` whose `integer` is set is multiplied as it is stored where there is a way:
    on a CPU `q8` quantises the rows of x. Any other is dequantised (see `common.quantization`).

    Args:
      x: The rows, in the dtype of the matrix; or in `dtype`.
      w: The matrix or stack.
      bias: Added; it broadcasts to the result.
      axis: The axis of inputs of `w`: -2, or -1 where it is [..., N, K].
      dtype: The dtype in which products are summed, and of the result; that of x if None.
    """
    if isinstance(w, QuantizedMatrix) and w.integer:
        plain = not torch.is_grad_enabled() and not forward_levels()
        y = _as_stored(x if plain else x.detach(), w, dtype or x.dtype)
        if y is not None:
            y = y.to(dtype or x.dtype)
            if forward_levels() or (x.requires_grad and torch.is_grad_enabled()):
                # Rounding has no slope: the derivative is that of the dequantised product.
                slope = _product(x, dense(w).to(x.dtype), None, axis, dtype)
                y = y + (slope - slope.detach())
            return y if bias is None else y + bias
    if isinstance(w, PackedMatrix) and takes(x, w):
        if w.ndim == 2:
            return kernels.product(x, w.packed[0], bias)
        y = _each(x, w.packed, kernels.product, w.shape)
        return y if bias is None else y + bias
    return _product(x, dense(w), bias, axis, dtype)


def _product(
    x: Tensor, w: Tensor, bias: Tensor | None, axis: int, dtype: torch.dtype | None
) -> Tensor:
    if w.ndim > 2:
        w = w if axis == -2 else w.mT
        x = x.expand(len(w), -1, -1)
        if x.shape[1] > 1 and fast_linear.gains(x[0], w[0].T):
            # One at a time; for one row PyTorch multiplies with all at a time.
            y = torch.stack([fast_linear.linear(*pair) for pair in zip(x, w.mT, strict=True)])
            return y if bias is None else y + bias
        return x @ w if bias is None else torch.baddbmm(bias, x, w)
    w = w.T if axis == -2 else w
    if dtype is None:
        if _is_bfloat16_row(x, w) and kernels.bfloat16_row_works():
            y = torch.mv(w, x.flatten()) if bias is None else torch.addmv(bias, w, x.flatten())
            return y.view(*x.shape[:-1], -1)
        return _linear(x, w, bias)
    # In parts, since in a narrower dtype each is copied to the wide one.
    parts = [w] if w.dtype == dtype else w.split(max(_PART_ELEMENTS // x.shape[-1], 1))
    with without_autocast(x.device):
        y = [_linear(x.to(dtype), part.to(dtype)) for part in parts]
    y = torch.cat(y, -1) if len(y) > 1 else y[0]
    return y if bias is None else y + bias


def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. On a CPU a few rows go as columns, in 0.6 to 0.9 of the time."""
    if fast_linear.gains(x, w):
        return fast_linear.linear(x, w, bias)
    if (
        w.dtype == torch.float32
        and w.is_cpu
        and x.numel() // x.shape[-1] in _COLUMNS
        and w.numel() >= _LEAST
        and not torch.is_grad_enabled()
        and type(w) in (Tensor, nn.Parameter)  # a subclass knows `linear`
        and not torch.compiler.is_compiling()
    ):
        y = (w @ x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return linear(x, w, bias)


def _is_bfloat16_row(x: Tensor, w: Tensor) -> bool:
    """Whether this is one row on a CPU: as a vector it takes two thirds of the time."""
    return (
        x.dtype == w.dtype == torch.bfloat16
        and x.numel() == x.shape[-1]
        and x.is_cpu
        and type(w) in (Tensor, nn.Parameter)  # a subclass knows `linear`
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _as_stored(x: Tensor, w: QuantizedMatrix, dtype: torch.dtype) -> Tensor | None:
    """x W with the values in their own bits; None where this device has no such product."""
    if w.device.type in few_rows.DEVICES:
        transformed = torch._C._are_functorch_transforms_active()
        return None if transformed else few_rows.product(x, w, dtype)
    if w.device.type != "cpu":
        return None
    return _integer_product(x, w) if w.scheme == "q8" else _product4(x, w)


def _integer_product(x: Tensor, w: QuantizedMatrix) -> Tensor:
    packed = w.pack(joined=_are_shared(x, w.shape))
    if packed is None:
        values, scale = once_for_rows(quantize_rows, x)
        sums = integer_sums(values, w.quantized.values).float()
    else:
        shifted, scale = once_for_rows(_shifted_rows, x)
        sums = _each(shifted, packed, kernels.product8, w.shape)
    return sums.mul_(scale).mul_(w.scale.mT)


def _shifted_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = quantize_rows(x)
    return kernels.shifted8(values), scale


def _are_shared(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether all matrices of a stack take the same rows."""
    return len(shape) > 2 and len(x) == 1


def quantize_rows(x: Float[Tensor, "*b k"]) -> tuple[Int8[Tensor, "*b k"], Float[Tensor, "*b 1"]]:
    """See `common.quantization.quantize_rows`."""
    x = x.float()
    # Not the norm of order infinity, which on a CPU takes twenty times as long.
    largest = x.abs().amax(-1, keepdim=True)
    # A quotient of two tensors, since a number divided by one is rounded twice.
    inverse = torch.div(_MOST, largest).clamp_(max=torch.finfo(torch.float32).max)
    return (x * inverse).round_().to(torch.int8), largest * (1 / LARGEST)


def integer_sums(x: Int8[Tensor, "*b k"], values: Int8[Tensor, "*c n k"]) -> Int[Tensor, "*d n"]:
    """See `common.quantization.integer_sums`."""
    if x.is_cpu and kernels.plain8_works():
        matrices = values if values.ndim > 2 else [values]
        return _each(x, matrices, kernels.plain_sums8, values.shape)
    # By products in float32, of as many inputs at a time as it adds exactly.
    sums = torch.zeros((), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[-1], _EXACT):
        part = slice(start, start + _EXACT)
        with without_autocast(x.device):
            products = x[..., part].float() @ values[..., part].float().mT
        sums = sums + products.to(torch.int32)
    return sums


def _each(
    x: Tensor, matrices: Any, multiply: Callable[..., Tensor], shape: Sequence[int]
) -> Tensor:
    """The products of rows with the matrices of a stack, or with the only one.

    Args:
      x: The rows, as `product` takes them.
      matrices: All of the stack, or one with the outputs of all.
      multiply: Takes rows and one of them.
      shape: The shape of the matrix or stack.
    """
    if len(shape) == 2:
        return multiply(x.flatten(0, -2), matrices[0]).view(*x.shape[:-1], -1)
    if len(matrices) == 1:
        return multiply(x[0], matrices[0]).unflatten(-1, (shape[0], -1)).transpose(0, 1)
    rows = x.expand(len(matrices), -1, -1)
    return torch.stack([multiply(*pair) for pair in zip(rows, matrices, strict=True)])


def _product4(x: Tensor, w: QuantizedMatrix) -> Tensor | None:
    """x W by the kernel of 4 bits for few rows, in bfloat16; None where it does not serve."""
    packed = None if x.dtype == torch.float64 else w.pack(joined=_are_shared(x, w.shape))
    if packed is None:
        return None
    if x.numel() <= _FEW * x.shape[-1]:
        return _each(once_for_rows(_as_bfloat16, x), packed, kernels.product4, w.shape)
    assert w.zero is not None
    shape = (len(packed), -1, w.scale.shape[-1])
    values = [matrix[0] for matrix in packed]
    matrices = list(zip(values, w.scale.view(shape), w.zero.view(shape), strict=True))
    return _each(x, matrices, kernels.wide_product4, w.shape)


def _as_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16()
