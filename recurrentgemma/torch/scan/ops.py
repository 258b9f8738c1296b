"""The recurrences as differentiable operators, opaque to `torch.compile` and `torch.export`.

Each keeps its arguments and its output for the backward pass. An operator takes the name of an
implementation; h0 has the state's dtype.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from recurrentgemma.torch.scan.gates import forward_levels, rg_lru_gates


def _implementation(name: str) -> ModuleType:
    # Import late: Triton takes a while to import, and may be absent.
    return importlib.import_module(f"recurrentgemma.torch.scan.{name}")


def _fold_batch(op):
    """A vmap rule: the mapped axis joins the batch."""

    def rule(info, in_dims, *args):
        mapped = [
            arg
            if not isinstance(arg, Tensor)
            else arg.expand(info.batch_size, *arg.shape)
            if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        folded = [arg.flatten(0, 1) if isinstance(arg, Tensor) else arg for arg in mapped]
        outputs = tuple(out.unflatten(0, mapped[0].shape[:2]) for out in op(*folded))
        return outputs, (0,) * len(outputs)

    return rule


def _define(name: str, arguments: str, like: tuple[str, ...]):
    """An operator whose outputs have the shapes and dtypes of the arguments named `like`.

    The outputs are always contiguous: compiled programs rely on it. `custom_op` does not serve: the
    autograd kernel that it adds does not run under torch.func transforms.
    """
    qualified = f"recurrentgemma::{name}"
    outputs = ", ".join(["Tensor"] * len(like))
    torch.library.define(qualified, f"({arguments}, str implementation) -> ({outputs})")
    op = getattr(torch.ops.recurrentgemma, name).default
    names = [argument.name for argument in op._schema.arguments]

    @torch.library.impl(qualified, "default")
    def _(*args):
        *inputs, implementation = args
        results = getattr(_implementation(implementation), name)(*inputs)
        return tuple(result.contiguous() for result in results)

    @torch.library.register_fake(qualified)
    def _(*args):
        named = dict(zip(names, args, strict=True))
        return tuple(named[argument].new_empty(named[argument].shape) for argument in like)

    torch.library.register_vmap(qualified, _fold_batch(op))
    return op


_linear_scan = _define(
    "linear_scan",
    "Tensor x, Tensor a, Tensor h0, Tensor? reset, bool reverse",
    ("x", "h0"),
)
_linear_scan_backward = _define(
    "linear_scan_backward",
    "Tensor dy, Tensor dlast, Tensor a, Tensor h0, Tensor? reset, Tensor y, bool reverse",
    ("dy", "a", "h0"),
)
_RG_LRU = (
    "Tensor x, Tensor input_gate, Tensor a_gate, Tensor a_param, Tensor segment_pos, Tensor h0"
)
_rg_lru_scan = _define("rg_lru_scan", _RG_LRU, ("x", "h0"))
_rg_lru_scan_backward = _define(
    "rg_lru_scan_backward",
    f"Tensor dy, Tensor dlast, {_RG_LRU}, Tensor y",
    ("x", "input_gate", "a_gate", "a_param", "h0"),
)


def linear_scan(
    x: Tensor, a: Tensor, h0: Tensor, reset: Tensor | None, reverse: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """See `scan.linear_scan`."""
    differentiable = torch.is_grad_enabled() or forward_levels()
    run = _LinearScan.apply if differentiable else _linear_scan
    return run(x, a, h0, reset, reverse, implementation)  # pyright: ignore[reportReturnType]


def rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    a_gate: Tensor,
    a_param: Tensor,
    segment_pos: Tensor,
    h0: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """See `scan.rg_lru_scan`; a_param is [B, D]."""
    if forward_levels():
        wide = (z.to(h0.dtype) for z in (x, input_gate, a_gate, a_param))
        gated_x, a = rg_lru_gates(*wide, segment_pos=segment_pos)
        y, last = linear_scan(gated_x, a, h0, segment_pos == 0, False, implementation)
        return y.to(x.dtype), last
    run = _RGLRUScan.apply if torch.is_grad_enabled() else _rg_lru_scan
    return run(x, input_gate, a_gate, a_param, segment_pos, h0, implementation)  # pyright: ignore[reportReturnType]


class _LinearScan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _linear_scan(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, a, h0, reset, ctx.reverse, ctx.implementation = inputs
        ctx.save_for_backward(a, h0, reset, output[0])
        ctx.save_for_forward(a, h0, reset, output[0])

    @staticmethod
    def backward(ctx, dy, dlast):  # pyright: ignore[reportIncompatibleMethodOverride]
        scan = _differentiable_backward if torch.is_grad_enabled() else _linear_scan_backward
        a, h0, reset, y = ctx.saved_tensors
        gradients = scan(dy, dlast, a, h0, reset, y, ctx.reverse, ctx.implementation)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx, dx, da, dh0, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        """dh_t = a_t dh_{t-1} + da_t h_{t-1} + dx_t: the same recurrence."""
        a, h0, reset, y = ctx.saved_tensors
        wide = h0.dtype
        parts = [y[:, 1:], h0[:, None]] if ctx.reverse else [h0[:, None], y[:, :-1]]
        dx_wide = torch.zeros_like(y, dtype=wide) if dx is None else dx.to(wide)
        if da is not None:
            change = da.to(wide) * torch.cat([part.to(wide) for part in parts], 1)
            dx_wide = dx_wide + (
                change if reset is None else torch.where(reset[..., None], 0, change)
            )
        dh0 = torch.zeros_like(h0) if dh0 is None else dh0
        dy, dlast = linear_scan(dx_wide, a.to(wide), dh0, reset, ctx.reverse, ctx.implementation)
        return dy.to(y.dtype), dlast


def _differentiable_backward(dy, dlast, a, h0, reset, y, reverse, implementation):
    """The same as `_linear_scan_backward`: dh_t = dy_t + a_{t+1} dh_{t+1}, da_t = dh_t h_{t-1}."""
    wide, dtypes = h0.dtype, (dy.dtype, a.dtype)
    dy, a, y = dy.to(wide), a.to(wide), y.to(wide)
    if reset is not None:
        a = torch.where(reset[..., None], 0, a)
    if reverse:
        dy, a, y = dy.flip(1), a.flip(1), y.flip(1)
    dh = (dy[:, -1] + dlast)[:, None]
    if dy.shape[1] > 1:
        earlier, _ = linear_scan(dy[:, :-1], a[:, 1:], dh[:, 0], None, True, implementation)
        dh = torch.cat([earlier, dh], 1)
    da = dh * torch.cat([h0[:, None], y[:, :-1]], 1)
    dh0 = a[:, 0] * dh[:, 0]
    if reverse:
        dh, da = dh.flip(1), da.flip(1)
    if reset is not None:
        da = torch.where(reset[..., None], 0, da)
    return dh.to(dtypes[0]), da.to(dtypes[1]), dh0


class _RGLRUScan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _rg_lru_scan(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *inputs, ctx.implementation = inputs
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx, dy, dlast):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.is_grad_enabled():
            dx, dinput_gate, da_gate, da_param, dh0 = _rg_lru_scan_backward(
                dy, dlast, *ctx.saved_tensors, ctx.implementation
            )
        else:  # a second derivative may follow: compute the same in differentiable operations
            *inputs, segment_pos, h0, y = ctx.saved_tensors

            def gates(*inputs):
                wide = (z.to(h0.dtype) for z in inputs)
                return rg_lru_gates(*wide, segment_pos=segment_pos)

            (_, a), pullback = torch.func.vjp(gates, *inputs)  # pyright: ignore[reportAssignmentType]
            dh, da, dh0 = _differentiable_backward(
                dy.to(h0.dtype), dlast, a, h0, segment_pos == 0, y, False, ctx.implementation
            )
            dx, dinput_gate, da_gate, da_param = pullback((dh, da))
        return dx, dinput_gate, da_gate, da_param, None, dh0, None


# Programs from `torch.export` call the operators directly, so these differentiate too. Under
# torch.func they cannot; the functions above can.
for _op, _function in ((_linear_scan, _LinearScan), (_rg_lru_scan, _RGLRUScan)):
    torch.library.register_autograd(
        _op._name, _function.backward, setup_context=_function.setup_context
    )
