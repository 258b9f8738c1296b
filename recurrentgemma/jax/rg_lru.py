"""The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

import flax.linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from recurrentgemma.jax.layers import BlockDiagonalLinear, SpecModule
from recurrentgemma.jax.scan import SCAN_TYPES, rg_lru_scan


class RGLRU(SpecModule):
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t.

    log a_t = -8 * sigmoid(a_gate(x_t)) * softplus(a_param) and i_t = sigmoid(input_gate(x_t)). At
    the start of a document h_{t-1} is forgotten and the square root is 1; padding changes nothing.
    Everything past the gates' linear maps is float32, or float64 beside float64.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t l"],
        segment_pos: Int[Array, "b t"],
        state: Float[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b t l"], Float[Array, "b l"]]:
        """Returns the outputs and the last state."""
        (x,) = promote_dtype(x, dtype=self.dtype)
        return rg_lru_scan(
            x,
            self.child(BlockDiagonalLinear, "input_gate")(x),
            self.child(BlockDiagonalLinear, "a_gate")(x),
            self.parameter("a_param"),
            segment_pos,
            state,
            implementation=SCAN_TYPES[self.config.scan_type],
            sharding_spec=self.scan_sharding_spec,
        )
