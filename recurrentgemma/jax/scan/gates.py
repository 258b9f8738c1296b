"""The gates: they compute each step's x_t and a_t from a scan's arguments.

They work elementwise, so a kernel computes them from the arguments that it has loaded, and computes
them again, with their derivative, in the backward pass.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array

from recurrentgemma.common.model.numerics import MAX_SQRT_GRADIENT
from recurrentgemma.jax.runtime.promotion import default_promotion


@default_promotion
def wide_dtype(dtype: Dtype) -> Dtype:
    """The dtype of states and of sensitive arithmetic: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """sqrt(x), with its derivative clipped at 1000."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    y = bounded_sqrt(primals[0])
    # Clamp y: the square root has an infinite slope at 0.
    slope = 0.5 / jnp.maximum(y, 0.25 / MAX_SQRT_GRADIENT)
    return y, tangents[0] * jnp.minimum(slope, MAX_SQRT_GRADIENT)


@jax.custom_jvp
def decayed(a: Array, h: Array) -> Array:
    """a * h; 0 where a is 0, even if the dropped state is infinite or NaN."""
    return a * jnp.where(a == 0, 0.0, h)


@decayed.defjvp
def _decayed_jvp(primals, tangents):
    (a, h), (da, dh) = primals, tangents
    return decayed(a, h), da * h + a * dh


Expm1 = Callable[[Array], Array]


class Inputs(NamedTuple):
    """A scan's arguments without its state; also their gradients, blocks or partitions.

    Attributes:
      x: The input of the recurrence, [B, T, D].
      sequences: The other arguments that vary by step, each [B, T, D].
      channels: The arguments that vary by channel only, each [D].
      position: 0 drops the state, a negative number changes nothing, [B, T]; or None.
    """

    x: Any
    sequences: tuple[Any, ...]
    channels: tuple[Any, ...]
    position: Any


class Gates(NamedTuple):
    """The gates of a recurrence.

    Attributes:
      function: Takes inputs of the state's dtype, whose shapes broadcast together, and returns x_t
        and a_t. Its second argument computes exp(x) - 1 for x <= 0.
      needs_x: Whether its derivative depends on x.
    """

    function: Callable[[Inputs, Expm1], tuple[Array, Array]]
    needs_x: bool


def _masked(x: Array, a: Array, position: Array | None) -> tuple[Array, Array]:
    if position is None:
        return x, a
    a = jnp.where(position == 0, 0.0, jnp.where(position < 0, 1.0, a))
    return jnp.where(position < 0, 0.0, x), a


def _identity(inputs: Inputs, expm1: Expm1) -> tuple[Array, Array]:
    del expm1
    return _masked(inputs.x, inputs.sequences[0], inputs.position)


def _rg_lru(inputs: Inputs, expm1: Expm1) -> tuple[Array, Array]:
    """exp(rate sigmoid(a_gate)) and sqrt(1 - a^2) sigmoid(input_gate) x; a start's root is 1."""
    (input_gate, a_gate), (rate,) = inputs.sequences, inputs.channels
    log_a = rate * jax.nn.sigmoid(a_gate)
    multiplier = jnp.where(inputs.position == 0, 1.0, bounded_sqrt(-expm1(2.0 * log_a)))
    gated_x = multiplier * jax.nn.sigmoid(input_gate) * inputs.x
    return _masked(gated_x, jnp.exp(log_a), inputs.position)


class Scan(abc.ABC):
    """An implementation of the recurrence; hashable."""

    @abc.abstractmethod
    def forward(
        self, gates: Gates, inputs: Inputs, h0: Array, reverse: bool
    ) -> tuple[Array, Array]:
        """All states in x's dtype, and the last one visited."""

    @abc.abstractmethod
    def backward(
        self,
        gates: Gates,
        inputs: Inputs,
        h0: Array,
        y: Array,
        dy: Array,
        dlast: Array,
        reverse: bool,
    ) -> tuple[Inputs, Array]:
        """Gradients of the inputs and of h0.

        With dh_t = dy_t + a_{t+1} dh_{t+1}: dx_t = dh_t, da_t = dh_t h_{t-1} and dh0 = a_0 dh_0;
        the gates' gradients follow. If the gates do not need `inputs.x`, it may hold anything.
        """


LINEAR = Gates(_identity, needs_x=False)
RG_LRU = Gates(_rg_lru, needs_x=True)
