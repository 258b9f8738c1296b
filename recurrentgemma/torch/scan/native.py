"""The recurrences in PyTorch's own operations, without autograd.

The sequence is cut into chunks that advance together. A first pass, from a zero state, computes
each chunk's last state and total decay; the same recurrence over these gives the states between
chunks; a second pass starts from those and writes the outputs. The work is a few operations on
[B, T / C, D] instead of T on [B, D]. The gates are computed for one part of the sequence at a time:
so their intermediate values stay in the cache.

A reset multiplies the state by 0, which turns an infinity or NaN into NaN in every later state. If
the last state is not finite, a second run on the CPU, step by step, puts 0 in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recurrentgemma.common.model.numerics import MAX_SQRT_GRADIENT, RG_LRU_C

_LOOP_LENGTH = 16
_MAX_CHUNK_LENGTH = 64
_PART_ELEMENTS = 2**17


def linear_scan(
    x: Tensor, a: Tensor, h0: Tensor, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """All states in x's dtype, and the last one visited."""
    wide = h0.dtype
    if reset is not None:
        h0 = _kept(h0, reset[:, -1 if reverse else 0])
    y = x.new_empty(x.shape, dtype=wide)
    inputs = x.to(wide), _kept(a.to(wide), reset), h0, reverse, y
    last = _scan(*inputs)
    if reset is not None and _is_lost(last, reset):
        last = _scan_by_step(*inputs)
    return y.to(x.dtype), last.clone(memory_format=torch.contiguous_format)


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
    wide = h0.dtype
    dx, da = (a.new_empty(a.shape, dtype=wide) for _ in range(2))
    a_kept = _kept(a.to(wide), reset)
    dh0 = _adjoint(dy.to(wide), dlast, a_kept, h0, y, reverse, dx, da)
    return dx.to(dy.dtype), _kept(da, reset).to(a.dtype), dh0


def rg_lru_scan(
    x: Tensor, input_gate: Tensor, a_gate: Tensor, a_param: Tensor, segment_pos: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    """All states in x's dtype, and the last one; a_param is [B, D]."""
    inputs = x, input_gate, a_gate, a_param, segment_pos, h0
    y, last = _rg_lru_scan(*inputs, scan=_scan)
    if _is_lost(last, segment_pos == 0):
        y, last = _rg_lru_scan(*inputs, scan=_scan_by_step)
    return y.to(x.dtype), last.clone(memory_format=torch.contiguous_format)


def _rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    a_gate: Tensor,
    a_param: Tensor,
    segment_pos: Tensor,
    h0: Tensor,
    scan: Callable[[Tensor, Tensor, Tensor, bool, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    wide, rate = h0.dtype, _rate(a_param)
    y = x.new_empty(x.shape, dtype=wide)
    state = _kept(h0, segment_pos[:, 0] == 0)
    for part, multiplier, a, spare in _parts(x.shape, h0, 3):
        torch.sigmoid(a_gate[:, part].to(wide), out=multiplier)
        _decays(multiplier, rate, segment_pos[:, part], a, spare)
        h = torch.sigmoid(input_gate[:, part].to(wide), out=y[:, part])
        h.mul_(x[:, part]).mul_(multiplier)
        _clear_padding(segment_pos[:, part], h)
        state = scan(h, a, state, False, h)
    return y, state


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, input_gate, a_gate, a_param and h0."""
    wide, rate = h0.dtype, _rate(a_param)
    dx, dinput_gate, da_gate = (z.new_empty(z.shape) for z in (x, input_gate, a_gate))
    drate = torch.zeros_like(h0)
    dstate = dlast
    for part, r, multiplier, a, i, dh, da in reversed(_parts(x.shape, h0, 6)):
        pos = segment_pos[:, part]
        torch.sigmoid(a_gate[:, part].to(wide), out=r)
        _decays(multiplier.copy_(r), rate, pos, a, i)
        before = y[:, part.start - 1] if part.start else _kept(h0, pos[:, 0] == 0)
        dstate = _adjoint(dy[:, part].to(wide), dstate, a, before, y[:, part], False, dh, da)

        torch.sigmoid(input_gate[:, part].to(wide), out=i)
        dgated = dh.mul_(i)
        torch.mul(dgated, multiplier, out=dx[:, part])
        dmultiplier = dgated.mul_(x[:, part])
        torch.mul(i.neg_().add_(1).mul_(multiplier), dmultiplier, out=dinput_gate[:, part])
        # The gradient of 1 - a^2, through a clipped root, is half of this; d(a^2) = 2 a^2 dlog_a.
        dsquare = multiplier.reciprocal_().clamp_(max=2 * MAX_SQRT_GRADIENT).mul_(dmultiplier)
        dlog_a = da.addcmul_(a, dsquare, value=-1).mul_(a)
        _clear_padding(pos, dx[:, part], dinput_gate[:, part], dlog_a)
        drate += dlog_a.mul_(r).sum(1)
        torch.mul(r.neg_().add_(1).mul_(rate[:, None]), dlog_a, out=da_gate[:, part])
    return dx, dinput_gate, da_gate, drate * (-RG_LRU_C * torch.sigmoid(a_param)), dstate


def _kept(z: Tensor, reset: Tensor | None) -> Tensor:
    return z if reset is None else z.masked_fill(reset[..., None], 0)


def _rate(a_param: Tensor) -> Tensor:
    return -RG_LRU_C * softplus(a_param)


def _parts(shape: torch.Size, h0: Tensor, num_scratch: int) -> list[tuple[Any, ...]]:
    """Slices of the sequence that fit the cache; all share the scratch tensors, [B, P, D]."""
    batch, length, width = shape
    steps = min(max(_PART_ELEMENTS // max(batch * width, 1), 1), length)
    scratch = h0.new_empty(num_scratch, batch, steps, width)
    starts = range(0, length, steps)
    return [
        (slice(start, start + steps), *scratch[:, :, : length - start].unbind()) for start in starts
    ]


def _any(mask: Tensor) -> bool:
    """Whether to apply a mask over steps: always on a device, where a look would have to wait."""
    return not mask.is_cpu or bool(mask.any())


def _clear_padding(position: Tensor, *tensors: Tensor) -> None:
    padding = position < 0
    if _any(padding):
        for z in tensors:
            z.masked_fill_(padding[..., None], 0)


def _decays(r: Tensor, rate: Tensor, position: Tensor, a: Tensor, spare: Tensor) -> None:
    """Writes a = exp(rate r) to `a` and sqrt(1 - a^2) to `r`.

    They are 0 and 1 at a start, 1 and 0 at padding. With t = tanh(log_a / 2), a = (1 + t) / (1 - t)
    and 1 - a^2 = -4 t / (1 - t)^2. Like expm1, this loses no digits where a is close to 1, and it
    takes a quarter of the time.
    """
    half_log_a = r.mul_(rate[:, None] / 2)
    if _any(position <= 0):
        half_log_a.masked_fill_((position == 0)[..., None], -torch.inf)
        half_log_a.masked_fill_((position < 0)[..., None], 0)
    t = half_log_a.tanh_()
    half_difference = torch.mul(t, -0.5, out=spare).add_(0.5)
    torch.div(t, half_difference, out=a).add_(1)
    t.neg_().sqrt_().div_(half_difference)


def _is_lost(last: Tensor, reset: Tensor) -> bool:
    """Whether a state that is not finite may have crossed a reset; checked on the CPU only.

    Such a state stays until the end, so a look at the last state is enough.
    """
    return last.is_cpu and not math.isfinite(float(last.sum())) and bool(reset.any())


def _adjoint(
    dy: Tensor,
    dlast: Tensor,
    a: Tensor,
    h0: Tensor,
    y: Tensor,
    reverse: bool,
    dh: Tensor,
    da: Tensor,
) -> Tensor:
    """Writes dh_t = dy_t + a_{t+1} dh_{t+1} and da_t = dh_t h_{t-1}; returns dh0 = a_0 dh_0."""
    first, last = (-1, 0) if reverse else (0, -1)
    earlier, later = (slice(1, None), slice(None, -1))[:: 1 if reverse else -1]
    torch.add(dy[:, last], dlast, out=dh[:, last])
    if dy.shape[1] > 1:
        _scan(dy[:, earlier], a[:, later], dh[:, last], not reverse, dh[:, earlier])
        torch.mul(dh[:, later], y[:, earlier], out=da[:, later])
    torch.mul(dh[:, first], h0, out=da[:, first])
    return a[:, first] * dh[:, first]


def _steps(z: Tensor, dim: int, reverse: bool) -> tuple[Tensor, ...]:
    steps = z.unbind(dim)
    return steps[::-1] if reverse else steps


def _scan_by_step(x: Tensor, a: Tensor, state: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """Like `_scan`, but an a of 0 also removes a state that is not finite."""
    for x_t, a_t, out_t in zip(*(_steps(z, 1, reverse) for z in (x, a, out)), strict=True):
        state = torch.addcmul(x_t, a_t, state.masked_fill(a_t == 0, 0), out=out_t)
    return state


def _scan(x: Tensor, a: Tensor, state: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """Writes all states to `out`, which may be x, and returns the last."""
    batch, length, width = x.shape
    if length <= _LOOP_LENGTH:
        for x_t, a_t, out_t in zip(*(_steps(z, 1, reverse) for z in (x, a, out)), strict=True):
            state = torch.addcmul(x_t, a_t, state, out=out_t)
        return state
    chunk = min(_MAX_CHUNK_LENGTH, math.isqrt(length))
    num_chunks = length // chunk
    # In the direction of the scan, the chunked part comes first, then the remainder.
    cut = length - num_chunks * chunk if reverse else num_chunks * chunk
    head, tail = (slice(cut, None), slice(None, cut)) if reverse else (
        slice(None, cut), slice(cut, None))  # fmt: skip
    x_bncd, a_bncd, out_bncd = (z[:, head].unflatten(1, (num_chunks, chunk)) for z in (x, a, out))

    all_but_first, all_but_last = (slice(1, None), slice(None, -1))[:: -1 if reverse else 1]
    x_0, x_1, *xs = _steps(x_bncd[:, all_but_last], 2, reverse)
    a_0, a_1, *decays = _steps(a_bncd[:, all_but_last], 2, reverse)
    end, decay = torch.addcmul(x_1, a_1, x_0), a_0 * a_1
    for x_c, a_c in zip(xs, decays, strict=True):
        torch.addcmul(x_c, a_c, end, out=end)
        decay *= a_c

    h = x.new_empty(batch, num_chunks, width)
    h[:, -1 if reverse else 0] = state
    _scan(end, decay, state, reverse, h[:, all_but_first])
    for steps in zip(*(_steps(z, 2, reverse) for z in (x_bncd, a_bncd, out_bncd)), strict=True):
        x_c, a_c, out_c = steps
        h = torch.addcmul(x_c, a_c, h, out=out_c)
    state = h[:, 0 if reverse else -1]
    if num_chunks * chunk < length:
        state = _scan(x[:, tail], a[:, tail], state, reverse, out[:, tail])
    return state
