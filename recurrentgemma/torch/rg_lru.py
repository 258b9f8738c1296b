"""The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.torch.layers import BlockDiagonalLinear, SpecModule
from recurrentgemma.torch.scan import SCAN_TYPES, rg_lru_scan


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
        return rg_lru_scan(
            x,
            self.input_gate(x),
            self.a_gate(x),
            self.a_param,
            segment_pos,
            state,
            implementation=SCAN_TYPES[self.config.scan_type],
        )
