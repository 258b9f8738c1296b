"""The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

from typing import Any

from torch import nn

from recurrentgemma.common.model import params
from recurrentgemma.common.model.presets import ScanType
from recurrentgemma.torch.cache import Hidden, Positions
from recurrentgemma.torch.layers import BlockDiagonalLinear, SpecModule
from recurrentgemma.torch.runtime.known import inside_documents, places
from recurrentgemma.torch.scan import SCAN_TYPES, as_positions, rg_lru_scan, rg_lru_step


class RGLRU(SpecModule):
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t.

    log a_t = -8 * sigmoid(a_gate(x_t)) * softplus(a_param) and i_t = sigmoid(input_gate(x_t)). At
    the start of a document h_{t-1} is forgotten and the square root is 1; padding changes nothing.
    Everything past the gates' linear maps is float32, or float64 beside float64.
    """

    a_param: nn.Parameter

    def __init__(
        self,
        width: int,
        num_heads: int,
        w_init_variance_scale=1.0,
        device=None,
        dtype=None,
        scan_type: ScanType = ScanType.AUTO,
    ) -> None:
        super().__init__(params.a_param(width), "meta", dtype)
        self.scan_type = scan_type
        sizes = (width, num_heads, w_init_variance_scale, "meta", dtype)
        self.input_gate = BlockDiagonalLinear(*sizes)
        self.a_gate = BlockDiagonalLinear(*sizes)
        self.materialise(device)

    def forward(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the last state."""
        segment_pos = as_positions(segment_pos, x)
        inputs = x, self.input_gate(x), self.a_gate(x), self.a_param
        if cache is not None and places(segment_pos) is not None:
            positions = None if inside_documents(segment_pos) else segment_pos
            y, new_cache = rg_lru_step(*inputs, cache, positions)
        else:
            choice = SCAN_TYPES[self.scan_type]
            y, new_cache = rg_lru_scan(*inputs, segment_pos, cache, implementation=choice)
        return y, new_cache if return_cache else None
