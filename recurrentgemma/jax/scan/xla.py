"""The recurrence without kernels: three forms that XLA compiles for any device.

Each runs out_t = a_t * out_{t-1} + x_t or its adjoint, out_t = a_{t-1} * out_{t-1} + x_t, where
t - 1 is the previous step in scan order. Both start from a state: the first step of the recurrence
multiplies it by a; the first step of the adjoint adds it unchanged. The recurrence ends in the last
out, the adjoint in the last out times its a.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from recurrentgemma.jax.scan.gates import Gates, Inputs, Scan, decayed, wide_dtype

Recurrence = Callable[[Array, Array, Array, bool, bool], tuple[Array, Array]]
UNROLLED_STEPS = 8


def loop(x: Array, a: Array, state: Array, reverse: bool, adjoint: bool) -> tuple[Array, Array]:
    """The definition, unrolled if there are few steps."""

    def step(state, inputs):
        x_t, a_t = inputs
        if adjoint:
            return a_t * (state + x_t), state + x_t
        state = decayed(a_t, state) + x_t
        return state, state

    inputs = (x.swapaxes(0, 1), a.swapaxes(0, 1))
    unroll = x.shape[1] <= UNROLLED_STEPS
    last, out = lax.scan(step, state, inputs, reverse=reverse, unroll=unroll)
    return out.swapaxes(0, 1), last


def associative(
    x: Array, a: Array, state: Array, reverse: bool, adjoint: bool
) -> tuple[Array, Array]:
    """A logarithmic number of passes over the sequence."""

    def combine(earlier, later):
        return earlier[0] * later[0], decayed(later[0], earlier[1]) + later[1]

    first, last = (-1, 0) if reverse else (0, -1)
    final = a[:, last]
    if adjoint:
        a = jnp.roll(a, -1 if reverse else 1, 1).at[:, first].set(1)
    x = x.at[:, first].add(decayed(a[:, first], state))
    _, out = lax.associative_scan(combine, (a, x), axis=1, reverse=reverse)
    return out, final * out[:, last] if adjoint else out[:, last]


def in_place(x: Array, a: Array, state: Array, reverse: bool, adjoint: bool) -> tuple[Array, Array]:
    """A loop over time that reads the state from the output and writes it there."""
    length = x.shape[1]

    def at(z: Array, t) -> Array:
        return lax.dynamic_index_in_dim(z, t, 1, keepdims=False)

    def step(i, out):
        t, before = (length - 1 - i, length - i) if reverse else (i, i - 1)
        if adjoint:
            carried = jnp.where(i == 0, state, at(a, before) * at(out, before))
        else:
            carried = decayed(at(a, t), jnp.where(i == 0, state, at(out, before)))
        return lax.dynamic_update_index_in_dim(out, carried + at(x, t), t, 1)

    out = lax.fori_loop(0, length, step, jnp.zeros_like(x))
    last = 0 if reverse else -1
    return out, a[:, last] * out[:, last] if adjoint else out[:, last]


def decays(gates: Gates, inputs: Inputs) -> Array:
    """All a_t, [B, T, D]."""
    return gates.function(_widened(inputs), jnp.expm1)[1]


@dataclasses.dataclass(frozen=True)
class XLAScan(Scan):
    """The gates, then one of the recurrences above."""

    recurrence: Recurrence

    def forward(
        self, gates: Gates, inputs: Inputs, h0: Array, reverse: bool
    ) -> tuple[Array, Array]:
        x, a = gates.function(_widened(inputs), jnp.expm1)
        y, last = self.recurrence(x, a, h0, reverse, False)
        return y.astype(inputs.x.dtype), last

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
        wide = _widened(inputs)
        # Sum over steps after the derivative: inside it, XLA compiles the sum to a slow loop.
        channels = tuple(jnp.broadcast_to(channel, y.shape) for channel in wide.channels)

        def gated(floats: Any):
            return gates.function(Inputs(*floats, position=wide.position), jnp.expm1)

        (_, a), pullback = jax.vjp(gated, (wide.x, wide.sequences, channels))
        dh, dh0 = self.recurrence(dy.astype(h0.dtype), a, dlast, not reverse, True)
        ((dx, dsequences, dchannels),) = pullback((dh, dh * _before(y, h0, reverse)))
        gradients = Inputs(dx, dsequences, tuple(d.sum((0, 1)) for d in dchannels), None)
        return jax.tree.map(
            lambda d, z: d.astype(z.dtype), gradients, inputs._replace(position=None)
        ), dh0

    def tangents(
        self,
        gates: Gates,
        inputs: Inputs,
        h0: Array,
        y: Array,
        dinputs: Inputs,
        dh0: Array,
        reverse: bool,
    ) -> tuple[Array, Array]:
        """The derivatives of all states and of the last: dh_t = a_t dh_{t-1} + da_t h_{t-1} + dx_t.

        Args are those of `backward`, with the derivatives of the inputs and of h0.
        """
        wide, dwide = _widened(inputs), _widened(dinputs)

        def gated(*floats: Any):
            return gates.function(Inputs(*floats, position=wide.position), jnp.expm1)

        (_, a), (dx, da) = jax.jvp(gated, tuple(wide[:3]), tuple(dwide[:3]))
        dx = dx + da * _before(y, h0, reverse)
        dh, dlast = self.recurrence(dx, a, dh0, reverse, False)
        return dh.astype(y.dtype), dlast


REFERENCE, IN_PLACE, ASSOCIATIVE = map(XLAScan, (loop, in_place, associative))


def _widened(inputs: Inputs) -> Inputs:
    wide = wide_dtype(inputs.x.dtype)
    x, sequences, channels = jax.tree.map(lambda z: z.astype(wide), inputs[:3])
    position = None if inputs.position is None else inputs.position[..., None]
    return Inputs(x, sequences, channels, position)


def _before(y: Array, h0: Array, reverse: bool) -> Array:
    """The state before each step, in the state's dtype."""
    parts = [y[:, 1:], h0[:, None]] if reverse else [h0[:, None], y[:, :-1]]
    return jnp.concatenate([part.astype(h0.dtype) for part in parts], 1)
