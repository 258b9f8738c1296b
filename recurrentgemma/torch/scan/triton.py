"""The recurrences as Triton kernels, without autograd: the choice of tiles and phases.

If a sequence is long and rows and channels are too few to fill the device, it is cut into chunks. A
first pass, from a zero state, computes each chunk's total decay and last state; the same recurrence
over these gives the states between chunks; a second pass computes all chunks at once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from recurrentgemma.torch.scan import triton_kernels as kernels

_LOAD_BYTES = 16  # in a thread's widest load
_MAX_STEPS = 8  # unrolled, so that compilation takes seconds
# Allow every register that a thread can have: otherwise ptxas uses fewer and spills.
COMPILER_OPTIONS = {"num_warps": 1, "maxnreg": 255}
# Elements of a tile in one thread: as many as the registers hold.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 32, 16
_WARPS_PER_PROCESSOR = 8  # a program has one warp
_MIN_CHUNKED_LENGTH = 512
_MIN_CHUNK = 64


class Tiling(NamedTuple):
    """How a scan over [B, T, D] is cut.

    Attributes:
      channels: Channels of a program.
      steps: Steps that a program loads at once.
      chunk: Steps of a program.
      num_chunks: Chunks of a sequence.
    """

    channels: int
    steps: int
    chunk: int
    num_chunks: int


class Processors(NamedTuple):
    """The processors of a device."""

    number: int
    lanes: int


# An interpreted program's time depends on its steps, and hardly on its channels.
INTERPRETER = Processors(number=4, lanes=1024)


def tiling(shape: tuple[int, ...], itemsize: int, elements: int, processors: Processors) -> Tiling:
    """Gives a thread as many channels as its widest load fits, if enough programs remain.

    Args:
      shape: [B, T, D].
      itemsize: Bytes of an element.
      elements: Elements of one sequence that a thread loads at once.
      processors: The device's processors.
    """
    batch, length, width = shape
    enough = processors.number * _WARPS_PER_PROCESSOR
    a_thread = max(_LOAD_BYTES // itemsize, 1)
    while a_thread > 1 and batch * triton.cdiv(width, a_thread * processors.lanes) < enough:
        a_thread //= 2
    channels = a_thread * processors.lanes
    steps = min(elements // a_thread, _MAX_STEPS)
    steps = min(steps, triton.next_power_of_2(length))
    programs = batch * triton.cdiv(width, channels)
    chunk = length
    if length >= _MIN_CHUNKED_LENGTH and 2 * programs <= enough:
        chunk = max(length * programs // enough, _MIN_CHUNK)
    chunk = triton.cdiv(chunk, steps) * steps
    return Tiling(channels, int(steps), int(chunk), int(triton.cdiv(length, chunk)))


def linear_scan(
    x: Tensor, a: Tensor, h0: Tensor, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """All states in x's dtype, and the last one visited."""
    return _forward(x, None, a, None, _position(reset), h0, reverse)


def linear_scan_backward(
    dy: Tensor,
    dlast: Tensor,
    a: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    y: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and h0."""
    gradients = _backward(dy, dlast, None, None, a, None, _position(reset), h0, y, reverse)
    dx, _, da, _, dh0 = gradients
    return dx, da, dh0


def rg_lru_scan(
    x: Tensor, input_gate: Tensor, a_gate: Tensor, a_param: Tensor, segment_pos: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    """All states in x's dtype, and the last one; a_param is [B, D]."""
    return _forward(x, input_gate, a_gate, a_param, segment_pos, h0, False)


def rg_lru_scan_backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    input_gate: Tensor,
    a_gate: Tensor,
    a_param: Tensor,
    segment_pos: Tensor,
    h0: Tensor,
    y: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, input_gate, a_gate, a_param and h0."""
    return _backward(dy, dlast, x, input_gate, a_gate, a_param, segment_pos, h0, y, False)


def _forward(x, input_gate, decay, a_param, position, h0, reverse) -> tuple[Tensor, Tensor]:
    tensors = x, input_gate, decay, a_param, position, h0
    x, input_gate, decay, a_param, position, h0 = map(_contiguous, tensors)
    cut = tiling(x.shape, x.itemsize, FORWARD_ELEMENTS, _processors(x.device))
    ends = None
    if cut.num_chunks > 1:
        totals, ends = _summarize(x, input_gate, decay, a_param, position, h0, reverse, cut)
        ends, _ = linear_scan(ends, totals, h0, None, False)
    y, last = torch.empty_like(x), torch.empty_like(h0)
    _launch(
        kernels.forward,
        x,
        cut,
        *(x, input_gate, decay, a_param, position, h0, ends, y, last),
        REVERSE=reverse,
    )
    return y, last


def _backward(
    dy, dlast, x, input_gate, decay, a_param, position, h0, y, reverse
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    tensors = dy, dlast, x, input_gate, decay, a_param, position, h0, y
    dy, dlast, x, input_gate, decay, a_param, position, h0, y = map(_contiguous, tensors)
    batch, _, width = dy.shape
    cut = tiling(dy.shape, dy.itemsize, BACKWARD_ELEMENTS, _processors(dy.device))
    ends = None
    if cut.num_chunks > 1:
        totals, ends = _summarize(
            dy, None, decay, a_param, position, h0, reverse, cut, adjoint=True
        )
        ends, _ = linear_scan(ends, totals, dlast, None, True)
    dx, ddecay, dh0 = torch.empty_like(dy), torch.empty_like(decay), torch.empty_like(h0)
    dinput_gate = None if input_gate is None else torch.empty_like(input_gate)
    da_param = None if a_param is None else h0.new_empty(batch, cut.num_chunks, width)
    _launch(
        kernels.backward,
        dy,
        cut,
        *(dy, dlast, ends, x, input_gate, decay, a_param, position, h0, y),
        *(dx, dinput_gate, ddecay, da_param, dh0),
        REVERSE=reverse,
    )
    return dx, dinput_gate, ddecay, None if da_param is None else da_param.sum(1), dh0


def _summarize(
    value, input_gate, decay, a_param, position, h0, reverse, cut, adjoint=False
) -> tuple[Tensor, Tensor]:
    batch, _, width = value.shape
    cut_short = cut._replace(num_chunks=cut.num_chunks - 1)
    totals, ends = (h0.new_empty(batch, cut_short.num_chunks, width) for _ in range(2))
    _launch(
        kernels.summarize,
        value,
        cut_short,
        *(value, input_gate, decay, a_param, position, totals, ends),
        REVERSE=reverse,
        ADJOINT=adjoint,
    )
    return totals, ends


def _launch(
    kernel: Any, like: Tensor, cut: Tiling, *arguments: Tensor | None, **constants: bool
) -> None:
    """Runs a kernel on the device and for the shape [B, T, D] of `like`."""
    batch, length, width = like.shape
    grid = (batch * cut.num_chunks * triton.cdiv(width, cut.channels),)
    with torch.cuda.device_of(like):
        kernel[grid](
            *arguments,
            *(length, width, cut.chunk),
            STEPS=cut.steps,
            CHANNELS=cut.channels,
            **COMPILER_OPTIONS,
            **constants,
        )


def _position(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else (~reset).to(torch.int8)


def _contiguous(z: Tensor | None) -> Any:
    return None if z is None else z.contiguous()


@functools.cache
def _processors(device: torch.device) -> Processors:
    if device.type != "cuda":
        return INTERPRETER
    return Processors(torch.cuda.get_device_properties(device).multi_processor_count, lanes=32)
