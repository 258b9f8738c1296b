"""What comes before the recurrence at each step: x_t and a_t from a scan's arguments.

Elementwise, so that a kernel computes it where a step's arguments are at hand, and again, with its
derivative, in the backward pass.
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


def wide_dtype(dtype: Dtype) -> Dtype:
    """The dtype of states and of sensitive arithmetic: float32, or float64 beside float64."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """sqrt(x), its derivative clipped at 1000."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    y = bounded_sqrt(primals[0])
    # Of no y so small that the derivative of this were infinite, which is none where it is clipped.
    slope = 0.5 / jnp.maximum(y, 0.25 / MAX_SQRT_GRADIENT)
    return y, tangents[0] * jnp.minimum(slope, MAX_SQRT_GRADIENT)


@jax.custom_jvp
def decayed(a: Array, h: Array) -> Array:
    """a * h; 0 where a is 0, so that a state which is forgotten may be anything."""
    return a * jnp.where(a == 0, 0.0, h)


@decayed.defjvp
def _decayed_jvp(primals, tangents):
    (a, h), (da, dh) = primals, tangents
    return decayed(a, h), da * h + a * dh


Expm1 = Callable[[Array], Array]


class Inputs(NamedTuple):
    """A scan's arguments but for its state; also their gradients, blocks or partitions.

    Attributes:
      x: What enters the recurrence, [B, T, D].
      sequences: What else each step has of its own, each [B, T, D].
      channels: What each channel has for all steps, each [D].
      position: 0 where the state is forgotten, below 0 where nothing changes, [B, T]; or None.
    """

    x: Any
    sequences: tuple[Any, ...]
    channels: tuple[Any, ...]
    position: Any


class Gates(NamedTuple):
    """What a recurrence applies to its arguments.

    Attributes:
      function: Gives x_t and a_t from inputs of the state's dtype, whose shapes broadcast together.
        Its second argument computes exp(x) - 1 for x <= 0.
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
    """exp(rate sigmoid(a_gate)) and sqrt(1 - a^2) sigmoid(input_gate) x; the root 1 at a start."""
    (input_gate, a_gate), (rate,) = inputs.sequences, inputs.channels
    log_a = rate * jax.nn.sigmoid(a_gate)
    multiplier = jnp.where(inputs.position == 0, 1.0, bounded_sqrt(-expm1(2.0 * log_a)))
    gated_x = multiplier * jax.nn.sigmoid(input_gate) * inputs.x
    return _masked(gated_x, jnp.exp(log_a), inputs.position)


class Scan(abc.ABC):
    """An implementation, hashable."""

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
        then those of the gates. `inputs.x` may be anything where the gates do not need it.
        """


LINEAR = Gates(_identity, needs_x=False)
RG_LRU = Gates(_rg_lru, needs_x=True)
