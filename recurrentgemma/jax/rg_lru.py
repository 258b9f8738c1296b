"""The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model import params
from recurrentgemma.jax.cache import Hidden, Positions
from recurrentgemma.jax.layers import BlockDiagonalLinear, SpecModule
from recurrentgemma.jax.scan import SCAN_TYPES, rg_lru_scan


class RGLRU(SpecModule):
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t.

    log a_t = -8 * sigmoid(a_gate(x_t)) * softplus(a_param) and i_t = sigmoid(input_gate(x_t)). At
    the start of a document h_{t-1} is forgotten and the square root is 1; padding changes nothing.
    Everything past the gates' linear maps is float32, or float64 beside float64.
    """

    width: int
    num_heads: int
    w_init_variance_scale: float = 1.0
    only_real: bool = True
    min_rad: float = 0.9

    @nn.compact
    def __call__(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the last state."""
        if not self.only_real:
            raise UserError("only_real must be True: no published model has a complex state")
        (a_param,) = self.declare(params.a_param(self.width, self.min_rad))
        (x,) = promote_dtype(x, dtype=self.dtype)
        sizes = (self.width, self.num_heads, None, self.w_init_variance_scale)
        y, new_cache = rg_lru_scan(
            x,
            self.child(BlockDiagonalLinear, "input_gate", *sizes)(x),
            self.child(BlockDiagonalLinear, "a_gate", *sizes)(x),
            a_param,
            segment_pos,
            cache,
            implementation=SCAN_TYPES[self.scan_type],
            sharding_spec=self.scan_sharding_spec,
        )
        return y, new_cache if return_cache else None
