"""The linear recurrence h_t = a_t * h_{t-1} + x_t: one entry, several implementations.

On the CPU the sequence is cut into chunks that advance together: a first pass over each chunk from
a zero state gives its last state and total decay, the states carried between chunks are the same
recurrence over these, and a second pass from the right carry writes the outputs. The work is a few
in-place operations on [B, T / C, D] instead of T on [B, D].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recurrentgemma.common.presets import ScanType

IMPLEMENTATIONS = ("auto", "reference", "native")
SCAN_TYPES = dict.fromkeys(ScanType, "auto")  # a JAX choice, as published
_LOOP_LENGTH = 16


def linear_scan(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    h0: Float[Tensor, "b d"] | None = None,
    reset: Bool[Tensor, "b t"] | None = None,
    *,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """h_t = a_t * h_{t-1} + x_t along axis 1, the state in float32 or wider.

    Args:
      x: Inputs, [B, T, D].
      a: Decays, [B, T, D].
      h0: State before the first step, [B, D]; zeros if None.
      reset: Where the state is forgotten (a_t taken as 0), [B, T].
      reverse: Run from the last step to the first.
      implementation: "auto", "reference" (a plain loop) or "native" (chunked).

    Returns:
      All states in x's dtype, [B, T, D], and the last one visited in the state's dtype, [B, D].

    Raises:
      ValueError: Shapes differ or the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if x.ndim != 3 or x.shape != a.shape:
        raise ValueError(
            f"x and a must have one shape [B, T, D], got {tuple(x.shape)} and {tuple(a.shape)}"
        )
    batch, length, width = x.shape
    if h0 is not None and h0.shape != (batch, width):
        raise ValueError(f"h0 must have shape {(batch, width)}, got {tuple(h0.shape)}")
    if reset is not None and reset.shape != (batch, length):
        raise ValueError(f"reset must have shape {(batch, length)}, got {tuple(reset.shape)}")
    wide = wide_dtype(x.dtype)
    if reset is not None:
        a = torch.where(reset[..., None], 0, a)
    state = x.new_zeros(batch, width, dtype=wide) if h0 is None else h0.to(wide)
    if length == 0:
        return x, state
    if implementation == "reference":
        y, last = _loop(x.to(wide), a.to(wide), state, reverse)
    else:
        y, last = _LinearScan.apply(x.to(wide), a.to(wide), state, reverse)  # pyright: ignore[reportGeneralTypeIssues]
    return y.to(x.dtype), last


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and of sensitive arithmetic: float32, or float64 beside float64."""
    return torch.promote_types(dtype, torch.float32)


def _loop(x: Tensor, a: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The definition."""
    outputs = []
    for t in _steps(x.shape[1], reverse):
        state = a[:, t] * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs[::-1] if reverse else outputs, 1), state


def _steps(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def _chunk_length(batch: int) -> int:
    return 64 if batch == 1 else 32


def _chunked(x: Tensor, a: Tensor, state: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """Writes all states to `out` and returns the last; no autograd."""
    batch, length, _ = x.shape
    chunk = min(_chunk_length(batch), max(length // 2, 1))
    if length <= _LOOP_LENGTH:
        for t in _steps(length, reverse):
            state = torch.addcmul(x[:, t], a[:, t], state, out=out[:, t])
        return state
    num_chunks = length // chunk
    # The chunked part comes first in the direction of the scan, the remainder after it.
    cut = length - num_chunks * chunk if reverse else num_chunks * chunk
    head, tail = (slice(cut, None), slice(None, cut)) if reverse else (
        slice(None, cut), slice(cut, None))  # fmt: skip
    x_bncd, a_bncd, out_bncd = (z[:, head].unflatten(1, (num_chunks, chunk)) for z in (x, a, out))
    steps = _steps(chunk, reverse)
    ends = x_bncd[:, :, steps[0]].clone()
    decays = a_bncd[:, :, steps[0]].clone()
    for c in steps[1:]:
        torch.addcmul(x_bncd[:, :, c], a_bncd[:, :, c], ends, out=ends)
        decays *= a_bncd[:, :, c]
    carries = torch.empty_like(ends)
    last = _chunked(ends, decays, state, reverse, carries)
    if reverse:
        h = torch.cat([carries[:, 1:], state[:, None]], 1)
    else:
        h = torch.cat([state[:, None], carries[:, :-1]], 1)
    for c in steps:
        h = torch.addcmul(x_bncd[:, :, c], a_bncd[:, :, c], h, out=out_bncd[:, :, c])
    if num_chunks * chunk < length:
        last = _chunked(x[:, tail], a[:, tail], last, reverse, out[:, tail])
    return last


# Operators of their own, opaque to torch.compile, which would otherwise unroll the loops. Not
# `custom_op`: the autograd kernel that it adds does not run under torch.func transforms.
_SCAN, _SCAN_BACKWARD = "recurrentgemma::linear_scan", "recurrentgemma::linear_scan_backward"
torch.library.define(_SCAN, "(Tensor x, Tensor a, Tensor h0, bool reverse) -> (Tensor, Tensor)")
torch.library.define(
    _SCAN_BACKWARD,
    "(Tensor dy, Tensor dlast, Tensor a, Tensor y, Tensor h0, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl(_SCAN, "default")
def _scan(x: Tensor, a: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    last = _chunked(x, a, h0, reverse, y)
    return y, last.clone()


@torch.library.register_fake(_SCAN)
def _(x: Tensor, a: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    del a, reverse
    return torch.empty_like(x), torch.empty_like(h0)


@torch.library.impl(_SCAN_BACKWARD, "default")
def _scan_backward(
    dy: Tensor, dlast: Tensor, a: Tensor, y: Tensor, h0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_t = dy_t + a_{t+1} dx_{t+1}; da_t = dx_t h_{t-1}; dh0 = a_0 dx_0."""
    dx, da = torch.empty_like(dy), torch.empty_like(a)
    first, last = (-1, 0) if reverse else (0, -1)
    earlier, later = (slice(1, None), slice(None, -1))[:: 1 if reverse else -1]
    torch.add(dy[:, last], dlast, out=dx[:, last])
    if dy.shape[1] > 1:
        _chunked(dy[:, earlier], a[:, later], dx[:, last], not reverse, dx[:, earlier])
        torch.mul(dx[:, later], y[:, earlier], out=da[:, later])
    torch.mul(dx[:, first], h0, out=da[:, first])
    return dx, da, a[:, first] * dx[:, first]


@torch.library.register_fake(_SCAN_BACKWARD)
def _(dy: Tensor, dlast: Tensor, a: Tensor, y: Tensor, h0: Tensor, reverse: bool):
    del dlast, y, reverse
    return torch.empty_like(dy), torch.empty_like(a), torch.empty_like(h0)


def _fold_batch(op):
    """A vmap rule: the mapped axis joins the batch."""

    def rule(info, in_dims, *args):
        folded = [
            arg
            if not isinstance(arg, Tensor)
            else arg.expand(info.batch_size, *arg.shape).flatten(0, 1)
            if dim is None
            else arg.movedim(dim, 0).flatten(0, 1)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        outputs = tuple(out.unflatten(0, (info.batch_size, -1)) for out in op(*folded))
        return outputs, (0,) * len(outputs)

    return rule


_scan_op = torch.ops.recurrentgemma.linear_scan.default
_scan_backward_op = torch.ops.recurrentgemma.linear_scan_backward.default
torch.library.register_vmap(_SCAN, _fold_batch(_scan_op))
torch.library.register_vmap(_SCAN_BACKWARD, _fold_batch(_scan_backward_op))


class _LinearScan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, h0: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        return _scan_op(x, a, h0, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, a, h0, ctx.reverse = inputs
        ctx.save_for_backward(a, output[0], h0)

    @staticmethod
    def backward(ctx, dy, dlast):  # pyright: ignore[reportIncompatibleMethodOverride]
        a, y, h0 = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_scan_backward_op(dy, dlast, a, y, h0, ctx.reverse), None
        # The gradient may itself be differentiated: the same in differentiable steps.
        if ctx.reverse:
            dy, a, y = dy.flip(1), a.flip(1), y.flip(1)
        dx = (dy[:, -1] + dlast)[:, None]
        if dy.shape[1] > 1:
            earlier, _ = _LinearScan.apply(dy[:, :-1], a[:, 1:], dx[:, 0], True)  # pyright: ignore[reportGeneralTypeIssues]
            dx = torch.cat([earlier, dx], 1)
        da = dx * torch.cat([h0[:, None], y[:, :-1]], 1)
        dh0 = a[:, 0] * dx[:, 0]
        return (dx.flip(1), da.flip(1), dh0, None) if ctx.reverse else (dx, da, dh0, None)
