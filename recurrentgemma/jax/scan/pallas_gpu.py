"""The recurrence on an NVIDIA GPU: one pass over [B, T, D], gates included.

A warp holds a few channels of one row and walks through time. It loads a tile of steps at once, to
keep many loads in flight, then computes and stores it. If rows and channels are too few to fill the
device, the sequence is cut into chunks: a first pass computes how each chunk changes a state (what
it adds, and by how much it decays the state), a short scan gives the states between chunks, and the
last pass starts from these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from recurrentgemma.jax.scan import xla as scan_xla
from recurrentgemma.jax.scan.gates import Gates, Inputs, Scan, decayed

_WIDTH = 64  # channels of a program
_TILE = 8  # steps
_PROGRAMS = 1024  # enough to fill a device
_SHORTEST_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How [B, T, D] is cut, and in which direction a program walks through it."""

    shape: tuple[int, int, int]
    reverse: bool

    @property
    def length(self) -> int:
        """Steps of a chunk."""
        batch, length, width = self.shape
        wanted = pl.cdiv(_PROGRAMS, batch * pl.cdiv(width, _WIDTH))
        chunks = max(1, min(wanted, length // _SHORTEST_CHUNK))
        return pl.cdiv(pl.cdiv(length, chunks), _TILE) * _TILE

    @property
    def grid(self) -> tuple[int, int, int]:
        batch, length, width = self.shape
        return batch, pl.cdiv(length, self.length), pl.cdiv(width, _WIDTH)

    def walk(self, tile: Callable[[list[Array], Any], Any], carry: Any) -> Any:
        """Calls `tile(steps, carry)` for each tile of this program's chunk, in scan order."""
        tiles = self.length // _TILE
        start = pl.program_id(1) * self.length

        def visit(i, carry):
            first = start + (tiles - 1 - i if self.reverse else i) * _TILE
            order = reversed(range(_TILE)) if self.reverse else range(_TILE)
            return tile([first + row for row in order], carry)

        return lax.fori_loop(0, tiles, visit, carry)

    def states_between(self, added: Array, decay: Array, state: Array) -> Array:
        """The state that each chunk starts from, [B, chunks, D]."""
        states, _ = scan_xla.associative(added, decay, state, self.reverse, False)
        first = state[:, None]
        parts = [states[:, 1:], first] if self.reverse else [first, states[:, :-1]]
        return jnp.concatenate(parts, 1)


class _Program:
    """The memory of one program: its row and channels."""

    def __init__(self, chunks: _Chunks) -> None:
        _, self.length, width = chunks.shape
        self.row, self.chunk = pl.program_id(0), pl.program_id(1)
        start = pl.program_id(2) * _WIDTH
        self.channels = pl.ds(start, _WIDTH)
        self.inside = start + jnp.arange(_WIDTH) < width

    def load(self, ref, *index: Any, mask: Any = True) -> Array:
        """These channels of a reference at an index, in float32; zeros where masked."""
        ref = ref.at[(*index, self.channels)]
        return plgpu.load(ref, mask=self.inside & mask, other=0.0).astype(jnp.float32)

    def store(self, value: Array, ref, *index: Any, mask: Any = True) -> None:
        """Writes these channels of a reference at an index."""
        ref = ref.at[(*index, self.channels)]
        plgpu.store(ref, value.astype(ref.dtype), mask=self.inside & mask)

    def step(self, ref, t: Array) -> Array:
        """One step of a sequence: zeros past either end."""
        mask = (t >= 0) & (t < self.length)
        return self.load(ref, self.row, jnp.clip(t, 0, self.length - 1), mask=mask)

    def store_step(self, value: Array, ref, t: Array) -> None:
        """Writes one step of a sequence, unless it is past the end."""
        last = self.length - 1
        self.store(value, ref, self.row, jnp.minimum(t, last), mask=t <= last)

    def load_state(self, ref) -> Array:
        """Loads the state that this chunk starts from."""
        return self.load(ref, self.row, self.chunk)

    def store_state(self, value: Array, ref) -> None:
        """Writes the state that this chunk ends in."""
        self.store(value, ref, self.row, self.chunk)

    def inputs(self, refs: Inputs, channels: tuple[Array, ...], t: Array) -> Inputs:
        """The inputs of a step; a step past the end is padding."""
        valid = t < self.length
        mine = jnp.int32(1)  # not a literal: Triton's lowering makes a bool of two literals
        if refs.position is not None:
            mine = refs.position[self.row, jnp.minimum(t, self.length - 1)]
        position = jnp.where(valid, mine, jnp.int32(-1))
        x = jnp.zeros(_WIDTH, jnp.float32) if refs.x is None else self.step(refs.x, t)
        sequences = tuple(self.step(ref, t) for ref in refs.sequences)
        return Inputs(x, sequences, channels, position)


def _summary_kernel(gates: Gates, chunks: _Chunks, inputs: Inputs, added, decay) -> None:
    """How a chunk changes a state: what it adds, and by how much it decays the state."""
    program = _Program(chunks)
    channels = tuple(map(program.load, inputs.channels))

    def tile(steps, carry):
        h, product = carry
        loaded = [program.inputs(inputs, channels, t) for t in steps]
        for step in loaded:
            x, a = gates.function(step, jnp.expm1)
            h, product = decayed(a, h) + x, a * product
        return h, product

    carry = jnp.zeros(_WIDTH, jnp.float32), jnp.ones(_WIDTH, jnp.float32)
    h, product = chunks.walk(tile, carry)
    program.store_state(h, added)
    program.store_state(product, decay)


def _forward_kernel(gates: Gates, chunks: _Chunks, inputs: Inputs, h0, y, last) -> None:
    program = _Program(chunks)
    channels = tuple(map(program.load, inputs.channels))

    def tile(steps, h):
        loaded = [program.inputs(inputs, channels, t) for t in steps]
        outputs = []
        for step in loaded:
            x, a = gates.function(step, jnp.expm1)
            h = decayed(a, h) + x
            outputs.append(h)
        for t, output in zip(steps, outputs, strict=True):
            program.store_step(output, y, t)
        return h

    program.store_state(chunks.walk(tile, program.load_state(h0)), last)


def _backward_summary_kernel(gates: Gates, chunks: _Chunks, inputs: Inputs, dy, added, decay):
    program = _Program(chunks)
    channels = tuple(map(program.load, inputs.channels))

    def tile(steps, carry):
        dh, product = carry
        loaded = [(program.inputs(inputs, channels, t), program.step(dy, t)) for t in steps]
        for step, dy_t in loaded:
            _, a = gates.function(step, jnp.expm1)
            dh, product = a * (dh + dy_t), a * product
        return dh, product

    carry = jnp.zeros(_WIDTH, jnp.float32), jnp.ones(_WIDTH, jnp.float32)
    dh, product = chunks.walk(tile, carry)
    program.store_state(dh, added)
    program.store_state(product, decay)


def _backward_kernel(
    gates: Gates,
    chunks: _Chunks,  # in the direction of the backward pass
    inputs: Inputs,
    h0,
    y,
    dy,
    dlast,
    gradients: Inputs,
    dh0,
) -> None:
    program = _Program(chunks)
    channels = tuple(map(program.load, inputs.channels))
    h_first = program.load(h0, program.row)
    first, back = (0, -1) if chunks.reverse else (program.length - 1, 1)

    def load(t):
        before = jnp.where(t == first, h_first, program.step(y, t + back))
        return program.inputs(inputs, channels, t), program.step(dy, t), before

    def tile(steps, carry):
        dh0, sums = carry
        loaded = [load(t) for t in steps]
        outputs = []
        for step, dy_t, before in loaded:

            def gated(floats: Any, position=step.position):
                return gates.function(Inputs(*floats, position=position), jnp.expm1)

            (_, a), pullback = jax.vjp(gated, step[:3])
            dh = dy_t + dh0
            dh0 = a * dh
            ((dx, dsequences, dchannels),) = pullback((dh, dh * before))
            sums = tuple(total + value for total, value in zip(sums, dchannels, strict=True))
            outputs.append((dx, *dsequences))
        refs = (gradients.x, *gradients.sequences)
        for t, values in zip(steps, outputs, strict=True):
            for ref, value in zip(refs, values, strict=True):
                program.store_step(value, ref, t)
        return dh0, sums

    carry = program.load_state(dlast), tuple(map(jnp.zeros_like, channels))
    result, sums = chunks.walk(tile, carry)
    program.store_state(result, dh0)
    for ref, total in zip(gradients.channels, sums, strict=True):
        program.store_state(total, ref)


@dataclasses.dataclass(frozen=True)
class PallasGPUScan(Scan):
    """Kernels for an NVIDIA GPU through Triton, or interpreted."""

    interpret: Any = False

    def forward(
        self, gates: Gates, inputs: Inputs, h0: Array, reverse: bool
    ) -> tuple[Array, Array]:
        chunks = _Chunks(inputs.x.shape, reverse)
        states = h0[:, None]
        if chunks.grid[1] > 1:
            added, decay = self._call(_summary_kernel, gates, chunks, self._states(chunks, h0, 2))(
                inputs
            )
            states = chunks.states_between(added, decay, h0)
        y, last = self._call(_forward_kernel, gates, chunks, (inputs.x, states))(inputs, states)
        return y, last[:, 0 if reverse else -1]

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
        batch, length, width = y.shape
        chunks = _Chunks((batch, length, width), not reverse)
        inputs = inputs if gates.needs_x else inputs._replace(x=None)
        states = dlast[:, None]
        if chunks.grid[1] > 1:
            added, decay = self._call(
                _backward_summary_kernel, gates, chunks, self._states(chunks, h0, 2)
            )(inputs, dy)
            states = chunks.states_between(added, decay, dlast)
        (sums,) = self._states(chunks, h0, 1)
        channels = (sums,) * len(inputs.channels)
        gradients, dh0 = self._call(
            _backward_kernel,
            gates,
            chunks,
            (Inputs(y, inputs.sequences, channels, None), states),
        )(inputs, h0, y, dy, states)
        channels = tuple(total.sum((0, 1)) for total in gradients.channels)
        return gradients._replace(channels=channels), dh0[:, -1 if reverse else 0]

    def _states(self, chunks: _Chunks, h0: Array, count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of `count` outputs that hold one state for each chunk."""
        batch, number, _ = chunks.grid
        shape = (batch, number, chunks.shape[2])
        return (jax.eval_shape(lambda h0: jnp.broadcast_to(h0[:, None], shape), h0),) * count

    def _call(self, kernel, gates: Gates, chunks: _Chunks, outputs):
        return pl.pallas_call(
            functools.partial(kernel, gates, chunks),
            grid=chunks.grid,
            out_shape=jax.eval_shape(lambda z: z, outputs),
            compiler_params=plgpu.CompilerParams(num_warps=1),
            interpret=self.interpret,
        )
