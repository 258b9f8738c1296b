"""Products with quantised matrices on a GPU, as an operator that traced programs keep whole.

Up to `FEW` rows go through a kernel that reads the matrix as it is stored; for more rows the matrix
is dequantised. The operator chooses when it runs, so a program exported for any number of rows has
both ways.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recurrentgemma.common.quantization import Quantized, dequantize, quantize
from recurrentgemma.torch.runtime.arrays import without_autocast

FEW = 16
DEVICES = ("cuda",)
_NEEDED = (8, 0)  # compute capability, from which Triton multiplies 16-bit numbers in matrix units
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAME = "recurrentgemma::quantized_product"
_found: dict[tuple[torch.device, str, torch.dtype], bool] = {}

torch.library.define(
    _NAME,
    "(Tensor x, Tensor values, Tensor scale, Tensor? zero, str scheme, ScalarType dtype) -> Tensor",
)


@torch.library.impl(_NAME, "default")
def _(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, dtype: torch.dtype
) -> Tensor:
    if 0 < x.shape[1] <= FEW and kernel_works(x.device, scheme, x.dtype):
        return _by_kernel(x, values, scale, zero, dtype)
    w = dequantize(Quantized(values, scale, zero, scheme), torch.stack).to(x.dtype)
    with without_autocast(x.device):
        return x.to(dtype) @ w.to(dtype)


@torch.library.register_fake(_NAME)
def _(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(values.shape[0], x.shape[1], values.shape[1], dtype=dtype)


def product(x: Float[Tensor, "*b k"], w: Any, dtype: torch.dtype) -> Float[Tensor, "*c n"]:
    """x W of a quantised matrix or stack; see `products.product`. It has no derivative."""
    rows, parts = x, (w.values, w.scale, w.zero)
    if w.ndim == 2:
        rows = x.reshape(1, -1, x.shape[-1])
        parts = tuple(None if part is None else part[None] for part in parts)
    y = torch.ops.recurrentgemma.quantized_product(rows, *parts, w.scheme, dtype)
    return y if w.ndim > 2 else y.view(*x.shape[:-1], -1)


def kernel_works(device: torch.device, scheme: str, dtype: torch.dtype) -> bool:
    """Whether the kernel for a scheme and a dtype of rows runs on a device, found once.

    It works if its results are as near to exact ones as sums in float32 are.
    """
    kind = device, scheme, dtype
    if kind not in _found:
        try:
            _found[kind] = _has_kernel(device, dtype) and _is_exact(*kind)
        except Exception:  # Triton's compiler and the driver raise many kinds
            _found[kind] = False
    return _found[kind]


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type not in DEVICES or dtype not in _DTYPES or not importlib.util.find_spec("triton"):
        return False
    new = torch.version.hip is not None or device.type != "cuda"
    return new or torch.cuda.get_device_capability(device) >= _NEEDED


@torch.no_grad()
def _is_exact(device: torch.device, scheme: str, dtype: torch.dtype) -> bool:
    """Compares a product with an exact one, in sizes that no block divides."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((96, 24)).astype(np.float32)
    w = quantize(matrix, scheme).with_parts(lambda part: torch.from_numpy(part[None]).to(device))
    rows = rng.standard_normal((1, 3, 96)).astype(np.float32)
    x = torch.from_numpy(rows).to(device, dtype)
    y = _by_kernel(x, w.values, w.scale, w.zero, torch.float32)
    wide, exact = x.double(), dequantize(w, torch.stack).double()
    bound = 2**-18 * (wide.abs() @ exact.abs())
    return bool(((y - wide @ exact).abs() <= bound).all())


def _by_kernel(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    # Import late: Triton takes a while to import, and may be absent.
    from recurrentgemma.torch.runtime import triton_products

    y = x.new_empty(values.shape[0], x.shape[1], values.shape[1], dtype=dtype)
    triton_products.product(x, values, scale, zero, y)
    return y
