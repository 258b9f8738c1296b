"""Triton kernels of the recurrences: one warp walks over time with the states of its channels.

A tile of steps is a tuple of rows, [CHANNELS] each: the loads of the next tile are in flight while
the rows of this one follow each other, and no thread needs a channel of another's. Steps are
counted in the direction of the scan: step s is at time s, or at T - 1 - s where `REVERSE`.

All take sequences [B, T, D] and position [B, T], which is 0 where the state is forgotten and below
0 where nothing changes; without `input_gate` and `a_param`, `decay` is a itself and not its gate.
A program has `CHANNELS` channels of one row and one chunk of `chunk` steps, a multiple of `STEPS`.
The arithmetic is in the dtype of the states.
"""

# A row exists if its pointer does: Triton resolves both when it compiles.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl

from recurrentgemma.common.model.numerics import MAX_SQRT_GRADIENT, RG_LRU_C

_C = tl.constexpr(RG_LRU_C)
_MIN_ROOT = tl.constexpr(0.5 / MAX_SQRT_GRADIENT)
_INFINITY = tl.constexpr(math.inf)
# The series of (exp(x) - 1) / x up to x^12 for float64; float32 takes the last 7 terms. For
# |x| < 1/4 the terms left out are below the last place.
_EXPM1 = tl.constexpr(tuple(1 / math.factorial(n) for n in range(13, 0, -1)))


@triton.jit
def _softplus(x):
    z = tl.exp(-tl.abs(x))
    w = 1 + z
    # log(1 + z), without losing digits of z in the sum.
    log1p = tl.where(w == 1, z, tl.log(w) * (z / tl.where(w == 1, 1.0, w - 1)))
    return tl.maximum(x, 0) + log1p


@triton.jit
def _decay(a_gate, rate, position):
    """r = sigmoid(a_gate), a = exp(rate r) and sqrt(1 - a^2).

    a and the root are 0 and 1 at a start, 1 and 0 at padding.
    """
    r = 1 / (1 + tl.exp(-a_gate))
    log_a = tl.where(position == 0, -_INFINITY, tl.where(position < 0, 0.0, rate * r))
    FIRST: tl.constexpr = 0 if log_a.dtype == tl.float64 else 6
    series = _EXPM1[FIRST] * log_a + _EXPM1[FIRST + 1]
    for n in tl.static_range(FIRST + 2, 13):
        series = series * log_a + _EXPM1[n]
    minus = tl.where(log_a > -0.25, series * log_a, tl.exp(log_a) - 1)  # expm1(log_a)
    return r, 1 + minus, tl.sqrt(-minus * (2 + minus))


@triton.jit
def _decayed(a, h):
    """a * h; 0 where a is 0, even if the dropped state is infinite or NaN."""
    return a * tl.where(a == 0, 0.0, h)


@triton.jit
def _program(D, num_chunks, CHANNELS: tl.constexpr):
    """This program's row, chunk and channels, and which of the channels exist."""
    blocks = (D + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    row = (program // blocks // num_chunks).to(tl.int64)
    return row, program // blocks % num_chunks, channel, channel < D


@triton.jit
def _time(row, step, T, REVERSE: tl.constexpr):
    """The index of a step among the B * T steps of all rows."""
    return row * T + (T - 1 - step if REVERSE else step)


@triton.jit
def _rows(pointer, offset, stride, count, other, SKIP: tl.constexpr, STEPS: tl.constexpr):
    """Loads the rows of a tile after the first `SKIP`; rows past `count` are `other`."""
    rows = ()
    for i in tl.static_range(SKIP, STEPS):
        rows += (tl.load(pointer + (offset + i * stride), mask=count > i, other=other),)
    return rows


@triton.jit
def _tile(
    value,
    input_gate,
    decay,
    position,
    row,
    channel,
    exists,
    start,
    count,
    T,
    D,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The rows of each sequence from a step on, empty for an absent one; then the positions."""
    time = _time(row, start, T, REVERSE)
    direction: tl.constexpr = -1 if REVERSE else 1
    offset, stride = time * D + channel, direction * D
    counts = tl.where(exists, count, 0)
    decays = _rows(decay, offset, stride, counts, 1.0, 0, STEPS)
    values = ()
    gates = ()
    positions = ()
    if value is not None:
        values = _rows(value, offset, stride, counts, 0.0, 0, STEPS)
    if input_gate is not None:
        gates = _rows(input_gate, offset, stride, counts, 0.0, 0, STEPS)
    if position is not None:
        positions = _rows(position, time, direction, count, -1, 0, STEPS)
    return values, gates, decays, positions


@triton.jit
def summarize(
    value,
    input_gate,
    decay,
    a_param,
    position,
    totals,
    ends,
    T,
    D,
    chunk,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The product of a chunk's decays, and its last state from a zero state, [B, chunks - 1, D].

    The recurrence leaves out the last chunk; the adjoint recurrence g_s = a_s (value_s + g_{s+1})
    leaves out the first.
    """
    num_chunks = (T + chunk - 1) // chunk - 1
    row, index, channel, exists = _program(D, num_chunks, CHANNELS)
    wide = ends.dtype.element_ty
    if a_param is not None:
        rate = _softplus(tl.load(a_param + row * D + channel, mask=exists, other=0.0)) * -_C
    FROM: tl.constexpr = STEPS - 1 if ADJOINT else 0
    TO: tl.constexpr = -1 if ADJOINT else STEPS
    BY: tl.constexpr = -1 if ADJOINT else 1
    total = tl.full([CHANNELS], 1.0, wide)
    h = tl.full([CHANNELS], 0.0, wide)
    first = (index + ADJOINT) * chunk
    end = tl.minimum(first + chunk, T)
    for tile in range(0, chunk, STEPS):
        start = first + (chunk - STEPS - tile if ADJOINT else tile)
        values, gates, decays, positions = _tile(
            value,
            input_gate,
            decay,
            position,
            row,
            channel,
            exists,
            start,
            end - start,
            T,
            D,
            REVERSE,
            STEPS,
        )
        for i in tl.static_range(FROM, TO, BY):
            a = decays[i].to(wide)
            x = values[i].to(wide)
            if a_param is not None:
                _, a, root = _decay(a, rate, positions[i])
                if input_gate is not None:
                    x *= root / (1 + tl.exp(-gates[i].to(wide)))
                    x = tl.where(positions[i] < 0, 0.0, x)
            elif position is not None:
                a = tl.where(positions[i] == 0, 0.0, a)
            h = a * (h + x) if ADJOINT else _decayed(a, h) + x
            total *= a
    out = (row * num_chunks + index) * D + channel
    tl.store(totals + out, total, mask=exists)
    tl.store(ends + out, h, mask=exists)


@triton.jit
def forward(
    x,
    input_gate,
    decay,
    a_param,
    position,
    h0,
    ends,
    y,
    last,
    T,
    D,
    chunk,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """All states and the last, [B, D]; `ends` has the states between chunks, [B, chunks - 1, D]."""
    num_chunks = (T + chunk - 1) // chunk
    row, index, channel, exists = _program(D, num_chunks, CHANNELS)
    wide = h0.dtype.element_ty
    state = row * D + channel
    if a_param is not None:
        rate = _softplus(tl.load(a_param + state, mask=exists, other=0.0)) * -_C
    h = tl.load(h0 + state, mask=tl.where(index == 0, channel, D) < D, other=0.0)
    if ends is not None:
        between = (row * (num_chunks - 1) + index - 1) * D + channel
        h += tl.load(ends + between, mask=tl.where(index > 0, channel, D) < D, other=0.0)
    first = index * chunk
    end = tl.minimum(first + chunk, T)
    stride = -D if REVERSE else D
    xs, gates, decays, positions = _tile(
        x,
        input_gate,
        decay,
        position,
        row,
        channel,
        exists,
        first,
        end - first,
        T,
        D,
        REVERSE,
        STEPS,
    )
    for start in range(first, end, STEPS):
        following = _tile(
            x,
            input_gate,
            decay,
            position,
            row,
            channel,
            exists,
            start + STEPS,
            end - start - STEPS,
            T,
            D,
            REVERSE,
            STEPS,
        )
        offset = _time(row, start, T, REVERSE) * D + channel
        counts = tl.where(exists, end - start, 0)
        for i in tl.static_range(STEPS):
            x_s = xs[i].to(wide)
            a = decays[i].to(wide)
            if a_param is not None:
                _, a, root = _decay(a, rate, positions[i])
                x_s *= root / (1 + tl.exp(-gates[i].to(wide)))
                x_s = tl.where(positions[i] < 0, 0.0, x_s)
            elif position is not None:
                a = tl.where(positions[i] == 0, 0.0, a)
            h = _decayed(a, h) + x_s
            tl.store(y + (offset + i * stride), h.to(y.dtype.element_ty), mask=counts > i)
        xs, gates, decays, positions = following
    tl.store(last + state, h, mask=tl.where(index == num_chunks - 1, channel, D) < D)


@triton.jit
def backward(
    dy,
    dlast,
    ends,
    x,
    input_gate,
    decay,
    a_param,
    position,
    h0,
    y,
    dx,
    dinput_gate,
    ddecay,
    da_param,
    dh0,
    T,
    D,
    chunk,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of all inputs; a_param's gradient comes chunk by chunk, [B, chunks, D].

    With g_s = a_s dh_s: dh_s = dy_s + g_{s+1} and da_s = dh_s h_{s-1}. `ends` has g between chunks,
    [B, chunks - 1, D].
    """
    num_chunks = (T + chunk - 1) // chunk
    row, index, channel, exists = _program(D, num_chunks, CHANNELS)
    wide = h0.dtype.element_ty
    state = row * D + channel
    if a_param is not None:
        parameter = tl.load(a_param + state, mask=exists, other=0.0)
        rate = _softplus(parameter) * -_C
        drate = tl.full([CHANNELS], 0.0, wide)
    last_chunk = num_chunks - 1
    g = tl.load(dlast + state, mask=tl.where(index == last_chunk, channel, D) < D, other=0.0)
    if ends is not None:
        between = (row * last_chunk + index) * D + channel
        g += tl.load(ends + between, mask=tl.where(index < last_chunk, channel, D) < D, other=0.0)
    first = index * chunk
    end = tl.minimum(first + chunk, T)
    stride = -D if REVERSE else D
    num_tiles = (end - first + STEPS - 1) // STEPS
    for tile in range(num_tiles):
        start = first + (num_tiles - 1 - tile) * STEPS
        xs, gates, decays, positions = _tile(
            x,
            input_gate,
            decay,
            position,
            row,
            channel,
            exists,
            start,
            end - start,
            T,
            D,
            REVERSE,
            STEPS,
        )
        offset = _time(row, start, T, REVERSE) * D + channel
        counts = tl.where(exists, end - start, 0)
        dys = _rows(dy, offset, stride, counts, 0.0, 0, STEPS)
        before = tl.load(h0 + state, mask=tl.where(start == 0, channel, D) < D, other=0.0)
        inside = tl.where(start > 0, channel, D) < D
        before += tl.load(y + (offset - stride), mask=inside, other=0.0).to(wide)
        befores = (before,) + _rows(y, offset - stride, stride, counts, 0.0, 1, STEPS)  # noqa: RUF005
        for i in tl.static_range(STEPS - 1, -1, -1):
            there = counts > i
            row_offset = offset + i * stride
            dh = dys[i].to(wide) + g
            a = decays[i].to(wide)
            if a_param is not None:
                r, a, root = _decay(a, rate, positions[i])
                gate = 1 / (1 + tl.exp(-gates[i].to(wide)))
                g = a * dh
                dgated = dh * gate
                dx_s = dgated * root
                dgated_x = dgated * xs[i].to(wide)
                dgate = dgated_x * root * (1 - gate)
                # Half of this is the gradient of 1 - a^2, through a clipped root.
                dsquare = dgated_x / tl.maximum(root, _MIN_ROOT)
                # Padding leaves a and g unchanged, and nothing depends on its inputs.
                padding = positions[i] < 0
                dgate = tl.where(padding, 0.0, dgate)
                da = _decayed(g, befores[i].to(wide)) - a * a * dsquare
                drate_s = tl.where(padding, 0.0, da * r)
                drate += drate_s
                da = drate_s * rate * (1 - r)
                tl.store(
                    dinput_gate + row_offset, dgate.to(dinput_gate.dtype.element_ty), mask=there
                )
            else:
                dx_s = dh
                da = dh * befores[i].to(wide)
                if position is not None:
                    a = tl.where(positions[i] == 0, 0.0, a)
                    da = tl.where(positions[i] == 0, 0.0, da)
                g = a * dh
            tl.store(dx + row_offset, dx_s.to(dx.dtype.element_ty), mask=there)
            tl.store(ddecay + row_offset, da.to(ddecay.dtype.element_ty), mask=there)
    if a_param is not None:
        out = (row * num_chunks + index) * D + channel
        tl.store(da_param + out, drate * -_C / (1 + tl.exp(-parameter)), mask=exists)
    tl.store(dh0 + state, g, mask=tl.where(index == 0, channel, D) < D)
