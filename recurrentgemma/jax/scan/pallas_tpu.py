"""The recurrence on a TPU: one pass over [B, T, D], gates included.

For each row and each block of channels, the grid walks the blocks of time in order and keeps the
state in VMEM between them. In a block, the kernel computes the gates of a whole tile of steps, then
scans its rows in registers. Steps past the end of the sequence are padding: they change nothing.
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
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from recurrentgemma.jax.scan.gates import Gates, Inputs, Scan, decayed

_TILE = 16  # steps: the rows of a bfloat16 tile
_BLOCK_TIME = 256
_BLOCK_WIDTH = 512
_LANES = 128


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How [B, T, D] is cut, and in which direction the grid walks through it."""

    shape: tuple[int, int, int]
    reverse: bool

    @property
    def time(self) -> int:
        return min(_BLOCK_TIME, pl.cdiv(self.shape[1], _TILE) * _TILE)

    @property
    def width(self) -> int:
        return min(_BLOCK_WIDTH, pl.cdiv(self.shape[2], _LANES) * _LANES)

    @property
    def grid(self) -> tuple[int, int, int]:
        batch, length, width = self.shape
        return batch, pl.cdiv(width, self.width), pl.cdiv(length, self.time)

    @property
    def tiles(self) -> int:
        return self.time // _TILE

    @property
    def ragged(self) -> bool:
        return self.shape[1] % self.time != 0

    def at(self, i: Any) -> Any:
        """The place in time of the i-th block visited."""
        return self.grid[2] - 1 - i if self.reverse else i

    def after(self, i: Any) -> Any:
        """The tile after the i-th block in scan order; any tile if there is none."""
        if self.reverse:
            return jnp.maximum(self.at(i) * self.tiles - 1, 0)
        return jnp.minimum((self.at(i) + 1) * self.tiles, pl.cdiv(self.shape[1], _TILE) - 1)

    def sequence(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.time, self.width), lambda b, d, i: (b, self.at(i), d))

    def edge(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, _TILE, self.width), lambda b, d, i: (b, self.after(i), d))

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.width), lambda b, d, i: (b, 0, d))

    def channel(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.width), lambda b, d, i: (0, d))

    def position(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, self.time), lambda b, d, i: (b, 0, self.at(i)), memory_space=pltpu.SMEM
        )

    def inputs(self, inputs: Inputs) -> Inputs:
        """The block specs of prepared inputs."""
        return Inputs(
            None if inputs.x is None else self.sequence(),
            (self.sequence(),) * len(inputs.sequences),
            (self.channel(),) * len(inputs.channels),
            None if inputs.position is None else self.position(),
        )

    def prepared(self, inputs: Inputs) -> Inputs:
        """Gives channels and positions shapes that can be cut into blocks."""
        position = inputs.position
        if position is not None:
            spare = self.grid[2] * self.time - self.shape[1]
            position = jnp.pad(position, ((0, 0), (0, spare)), constant_values=-1)[:, None]
        channels = tuple(channel[None] for channel in inputs.channels)
        return inputs._replace(channels=channels, position=position)

    def start(self) -> Any:
        """The first step of the current block; call it outside of loops, which hide the place."""
        return self.at(pl.program_id(2)) * self.time

    def steps(self, start: Any, k: Any) -> Array:
        """The steps of tile k of a block, [_TILE, width]."""
        return start + k * _TILE + lax.broadcasted_iota(jnp.int32, (_TILE, self.width), 0)

    def scan(self, tile: Callable[[Any, Array], Array], state: Array) -> Array:
        """Calls `tile(k, state)` for each tile of the current block, in scan order."""

        def visit(i, state):
            return tile(self.tiles - 1 - i if self.reverse else i, state)

        return lax.fori_loop(0, self.tiles, visit, state)


def _rows(k: Any) -> slice | pl.Slice:
    return pl.ds(pl.multiple_of(k * _TILE, _TILE), _TILE)


def _inputs_of_tile(refs: Inputs, blocks: _Blocks, start: Any, k: Any) -> Inputs:
    """The inputs of tile k in float32; steps past the end are padding."""
    tile = (_TILE, blocks.width)

    def load(ref):
        # Not ref[0, ...]: in JAX 0.9.0 its type alone has the axes of `jax.shard_map`.
        return ref[:, _rows(k), :].reshape(tile).astype(jnp.float32)

    x = jnp.zeros(tile, jnp.float32) if refs.x is None else load(refs.x)
    sequences = tuple(load(ref) for ref in refs.sequences)
    channels = tuple(jnp.broadcast_to(ref[...], tile) for ref in refs.channels)
    position = None
    if refs.position is not None:
        row = lax.broadcasted_iota(jnp.int32, (_TILE, _LANES), 0)
        position = jnp.full((_TILE, _LANES), -1)
        for i in range(_TILE):
            position = jnp.where(row == i, refs.position[0, 0, k * _TILE + i], position)
        position = jnp.concatenate([position] * (blocks.width // _LANES), 1)
    elif blocks.ragged:
        position = jnp.where(blocks.steps(start, k) < blocks.shape[1], 1, -1)
    return Inputs(x, sequences, channels, position)


def _expm1(x: Array) -> Array:
    """exp(x) - 1 for x <= 0; near 0, where the difference cancels, the series up to x^8."""
    series = jnp.ones_like(x)
    for n in range(8, 1, -1):
        series = 1.0 + x * series * (1.0 / n)
    return jnp.where(x > -0.35, x * series, jnp.exp(x) - 1.0)


@jax.custom_jvp
def _expm1_with_slope(x: Array) -> Array:
    return _expm1(x)


@_expm1_with_slope.defjvp
def _expm1_jvp(primals, tangents):
    y = _expm1(primals[0])
    return y, tangents[0] * (y + 1.0)


def _forward_kernel(gates: Gates, blocks: _Blocks, inputs: Inputs, h0, y, last, state) -> None:
    i, start = pl.program_id(2), blocks.start()

    @pl.when(i == 0)
    def _():
        state[...] = h0[0]

    def tile(k, h):
        x, a = gates.function(_inputs_of_tile(inputs, blocks, start, k), _expm1_with_slope)
        outputs = [h] * _TILE
        for row in reversed(range(_TILE)) if blocks.reverse else range(_TILE):
            h = decayed(a[row : row + 1], h) + x[row : row + 1]
            outputs[row] = h
        y[0, _rows(k), :] = jnp.concatenate(outputs).astype(y.dtype)
        return h

    state[...] = blocks.scan(tile, state[...])

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        last[0] = state[...]


def _backward_kernel(
    gates: Gates,
    blocks: _Blocks,  # in the direction of the backward pass
    inputs: Inputs,
    h0,
    y,
    edge,
    dy,
    dlast,
    gradients: Inputs,
    dh0,
    state,
    sums,
) -> None:
    i, start = pl.program_id(2), blocks.start()
    length = blocks.shape[1]

    @pl.when(i == 0)
    def _():
        state[...] = dlast[0]
        for total in sums:
            total[...] = jnp.zeros_like(total)

    def before(k) -> Array:
        """The states that the steps of tile k start from."""
        here = y[0, _rows(k), :].astype(jnp.float32)
        if blocks.reverse:
            first, other = 0, jnp.maximum(k - 1, 0)
            end, outside = k == 0, slice(_TILE - 1, _TILE)
        else:
            first, other = length - 1, jnp.minimum(k + 1, blocks.tiles - 1)
            end, outside = k == blocks.tiles - 1, slice(0, 1)
        inside = y[0, _rows(other), :].astype(jnp.float32)[outside]
        beyond = jnp.where(end, edge[0].astype(jnp.float32)[outside], inside)
        parts = [beyond, here[:-1]] if blocks.reverse else [here[1:], beyond]
        return jnp.where(blocks.steps(start, k) == first, h0[0], jnp.concatenate(parts))

    def tile(k, carry):
        tile_inputs = _inputs_of_tile(inputs, blocks, start, k)
        valid = blocks.steps(start, k) < length if blocks.ragged else None

        def gated(floats: Any):
            return gates.function(Inputs(*floats, position=tile_inputs.position), _expm1_with_slope)

        (_, a), pullback = jax.vjp(gated, tile_inputs[:3])
        dh = dy[0, _rows(k), :].astype(jnp.float32)
        if valid is not None:
            dh = jnp.where(valid, dh, 0.0)
        rows = [carry] * _TILE
        for row in reversed(range(_TILE)) if blocks.reverse else range(_TILE):
            rows[row] = dh[row : row + 1] + carry
            carry = a[row : row + 1] * rows[row]
        dh = jnp.concatenate(rows)
        ((dx, dsequences, dchannels),) = pullback((dh, dh * before(k)))
        outputs = (gradients.x, *gradients.sequences)
        for ref, value in zip(outputs, (dx, *dsequences), strict=True):
            ref[0, _rows(k), :] = value.astype(ref.dtype)
        for total, value in zip(sums, dchannels, strict=True):
            total[...] += value if valid is None else jnp.where(valid, value, 0.0)
        return carry

    state[...] = blocks.scan(tile, state[...])

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        dh0[0] = state[...]
        for ref, total in zip(gradients.channels, sums, strict=True):
            ref[0] = total[...].sum(0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class PallasTPUScan(Scan):
    """Kernels for a TPU, or interpreted."""

    interpret: Any = False

    def forward(
        self, gates: Gates, inputs: Inputs, h0: Array, reverse: bool
    ) -> tuple[Array, Array]:
        blocks = _Blocks(inputs.x.shape, reverse)
        prepared = blocks.prepared(inputs)
        y, last = self._call(
            functools.partial(_forward_kernel, gates, blocks),
            blocks,
            in_specs=(blocks.inputs(prepared), blocks.state()),
            out_specs=(blocks.sequence(), blocks.state()),
            out_shape=(inputs.x, h0[:, None]),
            scratch_shapes=[pltpu.VMEM((1, blocks.width), jnp.float32)],
        )(prepared, h0[:, None])
        return y, last[:, 0]

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
        blocks = _Blocks((batch, length, width), not reverse)
        prepared = blocks.prepared(inputs if gates.needs_x else inputs._replace(x=None))
        sequence, state = blocks.sequence(), blocks.state()
        partial_sums = tuple(h0[:, None] for _ in inputs.channels)
        gradients, dh0 = self._call(
            functools.partial(_backward_kernel, gates, blocks),
            blocks,
            in_specs=(blocks.inputs(prepared), state, sequence, blocks.edge(), sequence, state),
            out_specs=(
                Inputs(
                    sequence,
                    (sequence,) * len(inputs.sequences),
                    (state,) * len(inputs.channels),
                    None,
                ),
                state,
            ),
            out_shape=(Inputs(y, inputs.sequences, partial_sums, None), h0[:, None]),
            scratch_shapes=[
                pltpu.VMEM((1, blocks.width), jnp.float32),
                [pltpu.VMEM((_TILE, blocks.width), jnp.float32) for _ in inputs.channels],
            ],
        )(prepared, h0[:, None], y, y, dy, dlast[:, None])
        channels = tuple(total.sum((0, 1)) for total in gradients.channels)
        return gradients._replace(channels=channels), dh0[:, 0]

    def _call(self, kernel, blocks: _Blocks, *, out_shape, **kwargs):
        call = pl.pallas_call(
            kernel,
            grid=blocks.grid,
            out_shape=jax.eval_shape(lambda z: z, out_shape),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
            **kwargs,
        )
        # Indices must be int32; under `jax_enable_x64` Python's would be int64.
        return jax.enable_x64(False)(call)
