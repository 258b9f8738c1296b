"""Products of a few rows with quantised matrices, as a Triton kernel.

A program has some outputs of one matrix. It reads their values block by block as they are stored,
int8 or two of 4 bits a byte, and multiplies them with a tile of `ROWS` rows, those that are missing
as zeros. Values less their zeros are small integers, which every dtype holds exactly; sums and
scales are in float32. Neither the tile nor the order of the sums depends on the number of rows, so
no bit of a row's result does.
"""

# An array exists if its pointer does: Triton resolves both when it compiles.
# pyright: reportOptionalOperand=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
_LEAST = 16  # sides of a product in a processor's matrix unit
_MOST_OUTPUTS = 64
_VALUES = {2: 128, 4: 64}  # most values in a block, by the bytes of a row's values
_STAGES = {8: 4, 4: 6}  # blocks on their way from memory, by the bits of a value


class Tiling(NamedTuple):
    """How a matrix is cut.

    Attributes:
      outputs: Outputs of a program.
      step: Bytes of an output's values that are a block: at most a group.
      block: The power of 2 from `step` on.
      num_warps: Warps of a program.
      num_stages: Blocks on their way from memory.
    """

    outputs: int
    step: int
    block: int
    num_warps: int
    num_stages: int


def tiling(
    shape: tuple[int, ...], groups: int, bits: int, itemsize: int, processors: int
) -> Tiling:
    """The widest programs that occupy every processor, or the narrowest.

    Args:
      shape: The shape of the stored values, [C, N, bytes].
      groups: The groups of an output.
      bits: The bits of a value.
      itemsize: The bytes of a row's values.
      processors: The processors of the device.
    """
    stack, rows, stored = shape
    outputs = _MOST_OUTPUTS
    while outputs > _LEAST and stack * triton.cdiv(rows, outputs) < processors:
        outputs //= 2
    step, most = stored // groups, _VALUES[itemsize] * bits // 8
    if groups == 1 and bits == 8:  # one scale: blocks may be of any size
        step = min(step, most)
    while step > most and step % 2 == 0:
        step //= 2
    block = max(int(triton.next_power_of_2(step)), _LEAST)
    return Tiling(outputs, step, block, outputs // _LEAST, _STAGES[bits])


def product(x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, y: Tensor) -> None:
    """Writes x W, [C, M, N], to y, for at most `ROWS` rows, [C or 1, M, K].

    Args:
      x: The rows, in float32, bfloat16 or float16.
      values: int8, [C, N, K], or uint8, [C, N, K / 2]; see `common.quantization`.
      scale: float32, [C, N, G].
      zero: int8, [C, N, G], or None.
      y: The result.
    """
    x, values, scale = x.contiguous(), values.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    stack, rows, stored = values.shape
    groups, bits = scale.shape[-1], 8 if zero is None else 4
    cut = tiling(values.shape, groups, bits, x.itemsize, _processors(x.device))
    with torch.cuda.device_of(x):
        multiply[triton.cdiv(rows, cut.outputs), stack](
            *(x, values, scale, zero, y),
            *(x.shape[1], rows, stored, stored // groups, cut.step),
            0 if len(x) == 1 else x[0].numel(),
            ROWS=ROWS,
            OUTPUTS=cut.outputs,
            BLOCK=cut.block,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )


@triton.jit(do_not_specialize=["M"])  # one program for any number of rows
def multiply(
    x,
    values,
    scale,
    zero,
    y,
    M,
    N,
    stored,
    group,
    step,
    apart,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x W, [C, M, N].

    An output has `stored` bytes of values, a group of them `group`, and a block `step`. The rows
    of one matrix are `apart` values from those of the next.
    """
    matrix = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < N
    row = tl.arange(0, ROWS)
    byte = tl.arange(0, BLOCK)
    line = matrix * N + output
    values += line * stored
    narrow = x.dtype.element_ty
    EACH: tl.constexpr = 1 if zero is None else 2  # values of a byte
    value = tl.arange(0, EACH * BLOCK)
    x += matrix * apart + row * (EACH * stored)
    there = row < M
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, stored, step):
        end = tl.minimum(start + step, stored)
        place = start + byte
        block = tl.load(
            values[:, None] + place[None, :],
            mask=exists[:, None] & (place < end)[None, :],
            other=0,
        )
        place = EACH * start + value
        rows = tl.load(
            x[None, :] + place[:, None],
            mask=(place < EACH * end)[:, None] & there[None, :],
            other=0.0,
        )
        if zero is None:
            sums = tl.dot(block.to(narrow), rows, sums, input_precision="tf32x3")
        else:
            pairs = tl.permute(tl.reshape(rows, [BLOCK, 2, ROWS]), [0, 2, 1])
            first, second = tl.split(pairs)
            which = line * (stored // group) + start // group
            least = tl.load(zero + which, mask=exists, other=0)[:, None]
            low = ((block & 15).to(tl.int8) - least).to(narrow)
            high = ((block >> 4).to(tl.int8) - least).to(narrow)
            part = tl.dot(low, first, input_precision="tf32x3")
            part = tl.dot(high, second, part, input_precision="tf32x3")
            sums += part * tl.load(scale + which, mask=exists, other=0.0)[:, None]
    if zero is None:
        sums *= tl.load(scale + line, mask=exists, other=0.0)[:, None]
    place = (matrix * M + row[None, :]) * N + output[:, None]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=exists[:, None] & there[None, :])


@functools.cache
def _processors(device: torch.device) -> Any:
    if device.type != "cuda":  # interpreted, where a program takes long and its width does not
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
