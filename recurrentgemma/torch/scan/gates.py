"""The gates of the RG-LRU: they compute each step's x_t and a_t, in differentiable operations.

Kernels compute the same from the arguments that they have loaded, and compute it again, with its
derivative, in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn.functional import softplus

from recurrentgemma.common.model.numerics import MAX_SQRT_GRADIENT, RG_LRU_C

_MINUS_C = torch.tensor(-RG_LRU_C, device="cpu")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and of sensitive arithmetic: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


class BoundedSqrt(torch.autograd.Function):
    """sqrt(x), its derivative clipped at 1000."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sqrt(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        del inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        # Clamp y: the square root has an infinite slope at 0.
        slope = 0.5 / y.clamp(min=0.25 / MAX_SQRT_GRADIENT)
        return grad * slope.clamp(max=MAX_SQRT_GRADIENT)


def bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x), with its derivative clipped at 1000."""
    if forward_levels():
        is_steep, line = x < (0.5 / MAX_SQRT_GRADIENT) ** 2, MAX_SQRT_GRADIENT * x
        steep = line + (torch.sqrt(x) - line).detach()
        return torch.where(is_steep, steep, torch.sqrt(x.masked_fill(is_steep, 1)))
    if not torch.is_grad_enabled():
        return torch.sqrt(x)
    return BoundedSqrt.apply(x)  # pyright: ignore[reportReturnType]


def forward_levels() -> int:
    """How many forward-mode derivatives are being computed inside each other.

    An `autograd.Function` has a rule for one; inside two, PyTorch gives its rule tensors that lack
    the outer tangents, and the result is wrong without an error.
    """
    if forward_ad._current_level < 0:
        return 0
    return max(1, eager_transforms.JVP_NESTING)


def rg_lru_gates(
    x: Tensor, input_gate: Tensor, a_gate: Tensor, a_param: Tensor, segment_pos: Tensor
) -> tuple[Tensor, Tensor]:
    """sqrt(1 - a^2) sigmoid(input_gate) x and a = exp(rate sigmoid(a_gate)), all of one dtype.

    Where a document starts, the root is 1 and callers must not use a; padding changes nothing.
    """
    start, padding = (segment_pos == 0)[..., None], (segment_pos < 0)[..., None]
    log_a = -RG_LRU_C * softplus(a_param)[..., None, :] * torch.sigmoid(a_gate)
    multiplier = bounded_sqrt(-torch.expm1(2 * log_a)).masked_fill(start, 1)
    gated_x = (multiplier * torch.sigmoid(input_gate) * x).masked_fill(padding, 0)
    return gated_x, torch.exp(log_a).masked_fill(padding, 1)


def rg_lru_step(
    x: Tensor,
    input_gate: Tensor,
    a_gate: Tensor,
    a_param: Tensor,
    h0: Tensor,
    segment_pos: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The RG-LRU for a token a row, [B, 1, D], without derivatives.

    Without positions every row is inside its document; its result is the same to the bit with them.
    Small operations cost by their number: none has a number of Python's, which becomes a tensor.
    """
    dtype = wide_dtype(x.dtype)
    x_wide, input_gate, a_gate, a_param, h0 = (
        z if z.dtype == dtype else z.to(dtype) for z in (x, input_gate, a_gate, a_param, h0)
    )
    log_a = torch.sigmoid(a_gate).mul_(softplus(a_param)).mul_(_MINUS_C)
    multiplier = torch.expm1(log_a + log_a).neg_().sqrt_()
    gated_x, a, h0 = torch.sigmoid(input_gate).mul_(x_wide), log_a.exp_(), h0.unsqueeze(1)
    if segment_pos is not None:
        start, padding = (segment_pos == 0)[..., None], (segment_pos < 0)[..., None]
        multiplier, h0 = multiplier.masked_fill(start, 1), h0.masked_fill(start, 0)
        gated_x, a = gated_x.masked_fill(padding, 0), a.masked_fill(padding, 1)
        multiplier = multiplier.masked_fill(padding, 0)
    y = gated_x.mul_(multiplier).addcmul_(a, h0)
    return y if x.dtype == dtype else y.to(x.dtype), y.squeeze(1)
