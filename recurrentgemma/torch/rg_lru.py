"""The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.torch.layers import BlockDiagonalLinear, SpecModule
from recurrentgemma.torch.scan import SCAN_TYPES, linear_scan, wide_dtype

_MAX_SQRT_GRADIENT = 1000.0


class _BoundedSqrt(torch.autograd.Function):
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
        return grad * (0.5 / y).clamp(max=_MAX_SQRT_GRADIENT)


def bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x), its derivative clipped at 1000."""
    return _BoundedSqrt.apply(x)  # pyright: ignore[reportReturnType]


class RGLRU(SpecModule):
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t.

    log a_t = -8 * sigmoid(a_gate(x_t)) * softplus(a_param) and i_t = sigmoid(input_gate(x_t)). At
    the start of a document h_{t-1} is forgotten and the square root is 1; padding changes nothing.
    Everything past the gates' linear maps is float32, or float64 beside float64.
    """

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.a_param = self.parameter("a_param", device, dtype)
        kwargs = {"device": device, "dtype": dtype}
        self.input_gate = BlockDiagonalLinear(config, f"{prefix}.input_gate", **kwargs)
        self.a_gate = BlockDiagonalLinear(config, f"{prefix}.a_gate", **kwargs)
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t l"],
        segment_pos: Int[Tensor, "b t"],
        state: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b t l"], Float[Tensor, "b l"]]:
        """Returns the outputs and the last state."""
        wide = wide_dtype(x.dtype)
        input_gate = torch.sigmoid(self.input_gate(x).to(wide))
        a_gate = torch.sigmoid(self.a_gate(x).to(wide))
        log_a = -8.0 * a_gate * softplus(self.a_param.to(wide))
        starts, padding = (segment_pos == 0)[..., None], (segment_pos < 0)[..., None]
        multiplier = torch.where(starts, 1.0, bounded_sqrt(-torch.expm1(2.0 * log_a)))
        a = torch.where(padding, 1.0, torch.exp(log_a))
        gated_x = torch.where(padding, 0.0, x.to(wide) * input_gate * multiplier)
        y, last = linear_scan(
            gated_x,
            a,
            state,
            segment_pos == 0,
            implementation=SCAN_TYPES[self.config.scan_type],
        )
        return y.to(x.dtype), last
