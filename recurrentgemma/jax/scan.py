"""The linear recurrence h_t = a_t * h_{t-1} + x_t: one entry, several implementations.

On the CPU a loop over time updates the output in place, forward and backward, so that neither pass
copies the sequence; elsewhere the associative scan is used.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float

from recurrentgemma.common.presets import ScanType
from recurrentgemma.jax.sharding import ShardingSpec, sharded_scan

IMPLEMENTATIONS = ("auto", "reference", "xla", "associative")
SCAN_TYPES = {
    ScanType.AUTO: "auto",
    ScanType.LINEAR_NATIVE: "xla",
    ScanType.ASSOCIATIVE_NATIVE: "associative",
    ScanType.LINEAR_PALLAS: "auto",  # until there is a Pallas kernel
}


def linear_scan(
    x: Float[Array, "b t d"],
    a: Float[Array, "b t d"],
    h0: Float[Array, "b d"] | None = None,
    reset: Bool[Array, "b t"] | None = None,
    *,
    reverse: bool = False,
    implementation: str = "auto",
    sharding_spec: ShardingSpec | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """h_t = a_t * h_{t-1} + x_t along axis 1, the state in float32 or wider.

    Args:
      x: Inputs, [B, T, D].
      a: Decays, [B, T, D].
      h0: State before the first step, [B, D]; zeros if None.
      reset: Where the state is forgotten (a_t taken as 0), [B, T].
      reverse: Run from the last step to the first.
      implementation: "auto", "reference" (`lax.scan`), "xla" (an in-place loop) or "associative".
      sharding_spec: How the arrays are split over devices, if they are.

    Returns:
      All states in x's dtype, [B, T, D], and the last one visited in the state's dtype, [B, D].

    Raises:
      ValueError: Shapes differ or the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if x.ndim != 3 or x.shape != a.shape:
        raise ValueError(f"x and a must have one shape [B, T, D], got {x.shape} and {a.shape}")
    batch, length, width = x.shape
    if h0 is not None and h0.shape != (batch, width):
        raise ValueError(f"h0 must have shape {(batch, width)}, got {h0.shape}")
    if reset is not None and reset.shape != (batch, length):
        raise ValueError(f"reset must have shape {(batch, length)}, got {reset.shape}")
    wide = wide_dtype(x.dtype)
    if reset is not None:
        a = jnp.where(reset[..., None], 0, a)
    state = jnp.zeros((batch, width), wide) if h0 is None else h0.astype(wide)
    if length == 0:
        return x, state
    if implementation == "auto":
        implementation = "xla" if jax.default_backend() == "cpu" else "associative"
    scan = {"reference": _loop, "xla": _in_place, "associative": _associative}[implementation]
    if sharding_spec is not None:
        scan = sharded_scan(scan, sharding_spec)
    y, last = scan(x.astype(wide), a.astype(wide), state, reverse)
    return y.astype(x.dtype), last


def wide_dtype(dtype: Dtype) -> Dtype:
    """The dtype of states and of sensitive arithmetic: float32, or float64 beside float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _loop(x: Array, a: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    """The definition."""

    def step(state, inputs):
        x_t, a_t = inputs
        state = a_t * state + x_t
        return state, state

    inputs = (x.swapaxes(0, 1), a.swapaxes(0, 1))
    last, y = lax.scan(step, state, inputs, reverse=reverse)
    return y.swapaxes(0, 1), last


def _associative(x: Array, a: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    """A logarithmic number of passes over the sequence."""

    def combine(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    first = -1 if reverse else 0
    x = x.at[:, first].add(a[:, first] * state)
    _, y = lax.associative_scan(combine, (a, x), axis=1, reverse=reverse)
    return y, y[:, 0 if reverse else -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_place(x: Array, a: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    """A loop over time that updates the output in place."""
    length = x.shape[1]

    def step(i, carry):
        state, y = carry
        t = length - 1 - i if reverse else i
        state = _at(a, t) * state + _at(x, t)
        return state, lax.dynamic_update_index_in_dim(y, state, t, 1)

    last, y = lax.fori_loop(0, length, step, (state, jnp.zeros_like(x)), unroll=2)
    return y, last


def _in_place_forward(x: Array, a: Array, state: Array, reverse: bool):
    outputs: Any = _in_place(x, a, state, reverse)
    return outputs, (a, outputs[0], state)


def _in_place_backward(reverse: bool, residuals: Any, gradients: Any):
    """dx_t = dy_t + a_{t+1} dx_{t+1}; da_t = dx_t h_{t-1}; dh0 = a_0 dx_0."""
    a, y, h0 = residuals
    dy, dlast = gradients
    length = y.shape[1]

    def step(i, carry):
        dh, dx = carry
        t = i if reverse else length - 1 - i
        dx_t = _at(dy, t) + dh
        return _at(a, t) * dx_t, lax.dynamic_update_index_in_dim(dx, dx_t, t, 1)

    dh0, dx = lax.fori_loop(0, length, step, (dlast, jnp.zeros_like(dy)), unroll=2)
    parts = [y[:, 1:], h0[:, None]] if reverse else [h0[:, None], y[:, :-1]]
    return dx, dx * jnp.concatenate(parts, 1), dh0


def _at(x: Array, t) -> Array:
    return lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


_in_place.defvjp(_in_place_forward, _in_place_backward)
