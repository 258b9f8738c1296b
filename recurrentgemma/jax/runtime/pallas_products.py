"""Products of a few rows with quantised matrices on an NVIDIA GPU, as a Pallas kernel.

A program has some outputs of one matrix. It reads their values block by block as they are stored,
int8 or two of 4 bits a byte, and multiplies them with a tile of `FEW` rows, those that are missing
as zeros. Values less their zeros are small integers, which every dtype holds exactly, and float32
rows are three parts in bfloat16; sums and scales are in float32. Neither the tile nor the order of
the sums depends on the number of rows, so no bit of a row's result does.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from recurrentgemma.common.quantization import SCHEMES, Quantized, dequantize, quantize
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.targets import given_target, pallas_lowers

FEW = 16
_LEAST = 16  # sides of a product in a processor's matrix unit
_MOST_OUTPUTS = 64
_PROGRAMS = 128  # enough to occupy every processor
_VALUES = 128  # most values in a block
_STAGES = 4  # blocks on their way from memory
_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


class _Cut(NamedTuple):
    """How a matrix is cut.

    Attributes:
      outputs: Outputs of a program.
      group: Bytes of an output's values that share a scale.
      step: Bytes of an output's values that are a block: at most a group.
      block: The power of 2 from `step` on.
    """

    outputs: int
    group: int
    step: int
    block: int


def fits(x: Array, w: Quantized) -> bool:
    """Whether the kernel takes these rows of `products.product`."""
    rows = x.shape[1:-1] if w.ndim > 2 else x.shape[:-1]
    if not all(isinstance(size, int) for size in rows):  # a symbol
        return False
    return 0 < math.prod(rows) <= FEW and x.dtype in _DTYPES


@functools.cache
def kernel_works(device: jax.Device, scheme: str, dtype: str) -> bool:  # pyright: ignore[reportInvalidTypeForm]
    """Whether the kernel for a scheme and a dtype of rows runs on a device, found once.

    It works if its results are as near to exact ones as sums in float32 are.
    """
    if not pallas_lowers("gpu") or jnp.dtype(dtype) not in _DTYPES:
        return False
    rng = np.random.default_rng(0)
    held = quantize(rng.standard_normal((96, 24)).astype(np.float32), scheme)
    rows = np.asarray(jnp.asarray(rng.standard_normal((3, 96)), dtype))
    try:
        w = held.with_parts(lambda part: jax.device_put(part, device))
        y = np.asarray(product(jax.device_put(rows, device), w))
    except Exception:  # Triton's compiler and the driver raise many kinds
        return False
    wide, exact = rows.astype(np.float64), dequantize(held).astype(np.float64)
    return bool((abs(y - wide @ exact) <= 2**-18 * (abs(wide) @ abs(exact))).all())


def product(x: Float[Array, "*b k"], w: Quantized) -> Float[Array, "*c n"]:
    """x W in float32 of a matrix or a stack; see `products.product`."""
    rows, matrix = x, w
    if w.ndim == 2:
        rows, matrix = x.reshape(1, -1, x.shape[-1]), w.with_parts(lambda part: part[None])
    target = given_target()
    y = _product(rows, matrix, target is not None and target.interpret)
    return y if w.ndim > 2 else y.reshape(*x.shape[:-1], y.shape[-1])


@default_promotion
def _product(x: Array, w: Quantized, interpret: Any) -> Array:
    stack, outputs, stored = w.values.shape
    cut, num_rows = _cut(w), x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, FEW - num_rows), (0, 0)))
    each = x.shape[-1] // stored  # values of a byte
    rows = [[part[..., place::each] for part in _parts(x)] for place in range(each)]
    y = pl.pallas_call(
        functools.partial(_kernel, cut),
        grid=(pl.cdiv(outputs, cut.outputs), stack),
        out_shape=jax.ShapeDtypeStruct((stack, FEW, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(
            num_warps=max(cut.outputs // _LEAST, 1), num_stages=_STAGES
        ),
        interpret=interpret,
    )(rows, w.values, w.scale if w.zero is not None else w.scale[..., 0], w.zero)
    return y[:, :num_rows]


def _parts(x: Array) -> list[Array]:
    """float32 rows as three that sum up to them in bfloat16; others as they are."""
    if x.dtype != jnp.float32:
        return [x]
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _cut(w: Quantized) -> _Cut:
    stack, rows, stored = w.values.shape
    outputs = _MOST_OUTPUTS
    while outputs > _LEAST and stack * pl.cdiv(rows, outputs) < _PROGRAMS:
        outputs //= 2
    group = step = stored // w.scale.shape[-1]
    most = _VALUES * SCHEMES[w.scheme].bits // 8
    if w.zero is None:  # one scale: blocks may be of any size
        step = min(step, most)
    return _Cut(outputs, group, step, max(int(pl.next_power_of_2(step)), _LEAST))


def _kernel(cut: _Cut, rows, values, scale, zero, y) -> None:
    """y = x W, [C, 16, N]; `rows` has the parts of x, [C or 1, 16, B], for each value of a byte."""
    num_outputs, stored = y.shape[-1], values.shape[-1]
    first, matrix = pl.program_id(0) * cut.outputs, pl.program_id(1)
    outputs = pl.ds(first, cut.outputs)
    exists = first + jnp.arange(cut.outputs) < num_outputs
    byte, row = jnp.arange(cut.block), pl.ds(0, FEW)

    def column(ref, *index):
        """Scales or zeros, [outputs, 1]."""
        return plgpu.load(ref.at[(matrix, outputs, *index)], mask=exists, other=0)[:, None]

    def visit(i, sums):
        start = i * cut.step
        place = pl.ds(start, cut.block)
        inside = (byte < jnp.minimum(cut.step, stored - start))[None]

        def times(numbers, parts) -> Array:
            total = jnp.zeros((cut.outputs, FEW), jnp.float32)
            for part in parts:
                which = 0 if part.shape[0] == 1 else 1
                mask = jnp.broadcast_to(inside, (FEW, cut.block))
                x = plgpu.load(part.at[matrix * which, row, place], mask=mask, other=0)
                dimensions = ((1,), (1,)), ((), ())
                w = numbers.astype(x.dtype)
                total += lax.dot_general(w, x, dimensions, preferred_element_type=jnp.float32)
            return total

        block = plgpu.load(
            values.at[matrix, outputs, place], mask=exists[:, None] & inside, other=0
        )
        if zero is None:
            return sums + times(block, rows[0])
        group = start // cut.group
        least, block = column(zero, group).astype(jnp.int32), block.astype(jnp.int32)
        products = times((block & 15) - least, rows[0]) + times((block >> 4) - least, rows[1])
        return sums + products * column(scale, group)

    sums = jnp.zeros((cut.outputs, FEW), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(stored, cut.step), visit, sums)
    if zero is None:
        sums = sums * column(scale)
    mask = jnp.broadcast_to(exists[None], (FEW, cut.outputs))
    plgpu.store(y.at[matrix, row, outputs], sums.T, mask=mask)
