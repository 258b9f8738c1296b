"""Products in float32 on a CPU by the faster of PyTorch's libraries, with derivatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear

from recurrentgemma.torch.runtime import kernels
from recurrentgemma.torch.scan.gates import forward_levels

_LEAST = 2**18  # values of a matrix: with fewer, a call takes longer than the product
_LEAST_PRODUCTS = 2**22  # of all rows together, with which a smaller matrix gains too
# Where a program is exported, another machine may run it. Before PyTorch 2.7 nothing tells whether
# it is exported or compiled.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_NAME = "recurrentgemma::linear32"

torch.library.define(_NAME, "(Tensor x, Tensor w, Tensor? bias) -> Tensor")


@torch.library.impl(_NAME, "CPU")
def _(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return kernels.product(x, w, bias)


@torch.library.register_fake(_NAME)
def _(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(w))


def gains(x: Tensor, w: Tensor) -> bool:
    """Whether `linear` of rows, [..., K], with a matrix, [N, K], goes another way than PyTorch's.

    It does so with plain tensors alone: a subclass and a transform know PyTorch's `linear`.
    """
    return (
        w.dtype == x.dtype == torch.float32
        and w.is_cpu
        and (w.numel() >= _LEAST or x.numel() * len(w) >= _LEAST_PRODUCTS)
        and x.ndim > 1
        and x.numel() > 0
        and type(w) in (Tensor, nn.Parameter)
        and type(x) in (Tensor, nn.Parameter)
        and _is_dense(x)
        and _is_dense(w)
        and not (torch.compiler.is_compiling() and (torch.is_grad_enabled() or _is_exporting()))
        and not torch._C._are_functorch_transforms_active()
        and not forward_levels()
        and not torch.is_autocast_enabled("cpu")
        and kernels.plain32_gains()
    )


def _is_dense(x: Tensor) -> bool:
    """Whether its rows or columns have no gaps: oneDNN may take 1,000 times as long with gaps."""
    return x.is_contiguous() or (x.ndim == 2 and x.t().is_contiguous())


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, for which `gains` holds."""
    if torch.compiler.is_compiling():
        return torch.ops.recurrentgemma.linear32(x, w, bias)
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, w, bias)):
        # As rows: in place nothing may change a view that a function of ours returns.
        y: Tensor = _Linear.apply(x.flatten(0, -2), w, bias)  # pyright: ignore[reportAssignmentType]
        return y.view(*x.shape[:-1], -1)
    return kernels.product(x, w, bias)


class _Linear(torch.autograd.Function):
    """x W^T + b, whose derivatives are such products."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return kernels.product(x, w, bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, w.t()) if needs_x else None,
            _product(grad.t(), x.t()) if needs_w else None,
            grad.sum(0) if needs_bias else None,
        )


def _product(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, w) if gains(x, w) else plain_linear(x, w)
