"""The recurrences in PyTorch's own operations, without autograd.

The sequence is cut into chunks that advance together: a first pass over each chunk from a zero
state gives its last state and total decay, the states between chunks are the same recurrence over
these, and a second pass from the right state writes the outputs. The work is a few operations on
[B, T / C, D] instead of T on [B, D]. Gates are computed a part of the sequence at a time, so that
what lies between their operations stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from recurrentgemma.common.reference import RG_LRU_C

MAX_SQRT_GRADIENT = 1000.0
_LOOP_LENGTH = 16
_PART_ELEMENTS = 2**16


def linear_scan(
    x: Tensor, a: Tensor, h0: Tensor, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """All states in x's dtype, and the last one visited."""
    wide = h0.dtype
    y = x.new_empty(x.shape, dtype=wide)
    last = _scan(x.to(wide), _kept(a.to(wide), reset), h0, reverse, y)
    return y.to(x.dtype), last.clone()


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
    dx, da, dh0 = _adjoint(dy.to(wide), dlast, _kept(a.to(wide), reset), h0, y, reverse)
    return dx.to(dy.dtype), _kept(da, reset).to(a.dtype), dh0


def rg_lru_scan(
    x: Tensor, input_gate: Tensor, a_gate: Tensor, a_param: Tensor, segment_pos: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor]:
    """All states in x's dtype, and the last one; a_param is [B, D]."""
    half_rate = _rate(a_param)[:, None] / 2
    a, y = (x.new_empty(x.shape, dtype=h0.dtype) for _ in range(2))
    for x_p, i_p, r_p, pos, a_p, y_p in _parts(x, input_gate, a_gate, segment_pos, a, y):
        half_log_a = torch.sigmoid(r_p.to(h0.dtype)).mul_(half_rate)
        multiplier = _decays(half_log_a, pos, out=a_p)
        torch.mul(torch.sigmoid(i_p.to(h0.dtype)).mul_(x_p), multiplier, out=y_p)
        if _any(padding := pos < 0):
            y_p.masked_fill_(padding[..., None], 0)
    last = _scan(y, a, h0, False, y)
    return y.to(x.dtype), last.clone()


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
    wide = h0.dtype
    rate = _rate(a_param)[:, None]
    r, a, multiplier = (x.new_empty(x.shape, dtype=wide) for _ in range(3))
    for gate, pos, r_p, a_p, m_p in _parts(a_gate, segment_pos, r, a, multiplier):
        torch.sigmoid(gate.to(wide), out=r_p)
        m_p.copy_(_decays(r_p * (rate / 2), pos, out=a_p))
    dh, da, dh0 = _adjoint(dy.to(wide), dlast, a, h0, y, reverse=False)

    dx, dinput_gate, da_gate = (torch.empty_like(z) for z in (x, input_gate, a_gate))
    drate = torch.zeros_like(h0)
    for x_p, gate, pos, r_p, a_p, m_p, dh_p, da_p, dx_p, dgate_p, da_gate_p in _parts(
        x, input_gate, segment_pos, r, a, multiplier, dh, da, dx, dinput_gate, da_gate
    ):
        i = torch.sigmoid(gate.to(wide))
        dgated = dh_p * i
        dmultiplier = dgated * x_p
        dx_p.copy_(dgated.mul_(m_p))
        dgate_p.copy_(torch.rsub(i, 1).mul_(dmultiplier).mul_(m_p))
        # d(1 - a^2) is this over twice a clipped root, and d(a^2) / d(log a) = 2 a^2.
        dsquare = m_p.reciprocal().clamp_(max=2 * MAX_SQRT_GRADIENT).mul_(dmultiplier)
        dlog_a = da_p.addcmul_(a_p, dsquare, value=-1).mul_(a_p)
        if _any(padding := pos < 0):
            dlog_a.masked_fill_(padding[..., None], 0)
            for gradient in (dx_p, dgate_p):
                gradient.masked_fill_(padding[..., None], 0)
        dlog_a.mul_(r_p)
        drate += dlog_a.sum(1)
        da_gate_p.copy_(torch.rsub(r_p, 1).mul_(rate).mul_(dlog_a))
    return dx, dinput_gate, da_gate, drate * (-RG_LRU_C * torch.sigmoid(a_param)), dh0


def _kept(z: Tensor, reset: Tensor | None) -> Tensor:
    return z if reset is None else z.masked_fill(reset[..., None], 0)


def _rate(a_param: Tensor) -> Tensor:
    return -RG_LRU_C * softplus(a_param)


def _any(mask: Tensor) -> bool:
    """Whether a mask over steps is worth applying: always where to look would mean to wait."""
    return not mask.is_cpu or bool(mask.any())


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same steps of each, few enough for the cache."""
    batch, _, width = tensors[0].shape
    steps = max(_PART_ELEMENTS // (batch * width), 1)
    return zip(*(z.split(steps, 1) for z in tensors), strict=True)


def _decays(half_log_a: Tensor, position: Tensor, *, out: Tensor) -> Tensor:
    """Writes a and returns sqrt(1 - a^2): 0 and 1 at a start, 1 and 0 at padding.

    With t = tanh(log_a / 2), a = (1 + t) / (1 - t) and 1 - a^2 = -4 t / (1 - t)^2: no digits are
    lost where a is close to 1, as with expm1, at a third of its time.
    """
    if _any(special := position <= 0):
        del special
        half_log_a.masked_fill_((position == 0)[..., None], -torch.inf)
        half_log_a.masked_fill_((position < 0)[..., None], 0)
    t = half_log_a.tanh_()
    scale = torch.rsub(t, 0.5, alpha=0.5)
    multiplier = t.neg().sqrt_().div_(scale)
    torch.div(t, scale, out=out).add_(1)
    return multiplier


def _adjoint(
    dy: Tensor, dlast: Tensor, a: Tensor, h0: Tensor, y: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dh_t = dy_t + a_{t+1} dh_{t+1}, da_t = dh_t h_{t-1}, and dh0 = a_0 dh_0."""
    dh, da = torch.empty_like(a), torch.empty_like(a)
    first, last = (-1, 0) if reverse else (0, -1)
    earlier, later = (slice(1, None), slice(None, -1))[:: 1 if reverse else -1]
    torch.add(dy[:, last], dlast, out=dh[:, last])
    if dy.shape[1] > 1:
        _scan(dy[:, earlier], a[:, later], dh[:, last], not reverse, dh[:, earlier])
        torch.mul(dh[:, later], y[:, earlier], out=da[:, later])
    torch.mul(dh[:, first], h0, out=da[:, first])
    return dh, da, a[:, first] * dh[:, first]


def _steps(z: Tensor, dim: int, reverse: bool) -> tuple[Tensor, ...]:
    steps = z.unbind(dim)
    return steps[::-1] if reverse else steps


def _chunk_length(batch: int) -> int:
    return 64 if batch == 1 else 32


def _scan(x: Tensor, a: Tensor, state: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """Writes all states to `out`, which may be x, and returns the last."""
    batch, length, width = x.shape
    if length <= _LOOP_LENGTH:
        for x_t, a_t, out_t in zip(*(_steps(z, 1, reverse) for z in (x, a, out)), strict=True):
            state = torch.addcmul(x_t, a_t, state, out=out_t)
        return state
    chunk = min(_chunk_length(batch), length // 2)
    num_chunks = length // chunk
    # The chunked part comes first in the direction of the scan, the remainder after it.
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
