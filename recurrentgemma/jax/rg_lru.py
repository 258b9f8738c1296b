"""The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.nn import softplus
from jaxtyping import Array, Float, Int

from recurrentgemma.jax.layers import BlockDiagonalLinear, SpecModule
from recurrentgemma.jax.scan import SCAN_TYPES, linear_scan, wide_dtype

_MAX_SQRT_GRADIENT = 1000.0


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """sqrt(x), its derivative clipped at 1000."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    y = jnp.sqrt(primals[0])
    return y, tangents[0] * jnp.minimum(0.5 / y, _MAX_SQRT_GRADIENT)


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
        wide = wide_dtype(x.dtype)
        input_gate = jax.nn.sigmoid(self.child(BlockDiagonalLinear, "input_gate")(x).astype(wide))
        a_gate = jax.nn.sigmoid(self.child(BlockDiagonalLinear, "a_gate")(x).astype(wide))
        log_a = -8.0 * a_gate * softplus(self.parameter("a_param").astype(wide))
        starts, padding = (segment_pos == 0)[..., None], (segment_pos < 0)[..., None]
        multiplier = jnp.where(starts, 1.0, bounded_sqrt(-jnp.expm1(2.0 * log_a)))
        a = jnp.where(padding, 1.0, jnp.exp(log_a))
        gated_x = jnp.where(padding, 0.0, x.astype(wide) * input_gate * multiplier)
        y, last = linear_scan(
            gated_x,
            a,
            state,
            segment_pos == 0,
            implementation=SCAN_TYPES[self.config.scan_type],
            sharding_spec=self.scan_sharding_spec,
        )
        return y.astype(x.dtype), last
