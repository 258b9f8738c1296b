"""Rows whose tokens are split over processes: what each needs of those before it.

The processes along the axis "sequence" of a mesh hold equal parts of the tokens of the same rows,
in order. Between them go the states of the recurrence and the last tokens that a convolution or a
local attention sees; attention without a limit of its reach gathers keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad, softplus

from recurrentgemma.common.model.numerics import RG_LRU_C
from recurrentgemma.torch.scan import rg_lru_scan

_NOTHING = -2  # the document of a place before the row


class Before:
    """What stands before this process's tokens; it takes the place of a state."""

    def __init__(self, group: Any, segment_pos: Int[Tensor, "b t"]) -> None:
        """Begins a pass.

        Args:
          group: The processes along the axis.
          segment_pos: The positions of all tokens of the rows, which every process has.
        """
        self.group, self.index = group, dist.get_rank(group)
        self.count = dist.get_world_size(group)
        self.length = segment_pos.shape[1] // self.count
        self.document = torch.where(segment_pos < 0, -1, (segment_pos == 0).cumsum(-1))

    def own(self, z: Tensor) -> Tensor:
        """This process's part of [B, T, ...]."""
        return z[:, self.index * self.length : (self.index + 1) * self.length]

    def extended(self, x: Float[Tensor, "b t *d"], count: int) -> Float[Tensor, "b s *d"]:
        """x behind as many places before it: zeros before the row."""
        return torch.cat([_Halo.apply(x, count, self.group), x], 1)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def keys(
        self, kv: Float[Tensor, "b t *d"], reach: int | None
    ) -> tuple[Float[Tensor, "b s *d"], Int[Tensor, "b s"]]:
        """Keys and values that the own tokens may see, the own ones last, and their documents."""
        end = (self.index + 1) * self.length
        if reach is None:
            parts = _Gathered.apply(kv, self.group)
            kv = torch.cat(parts.unbind(), 1)  # pyright: ignore[reportAttributeAccessIssue]
            return kv[:, :end], self.document[:, :end]
        count = min(reach, self.document.shape[1] - self.length)
        document = pad(self.document, (count, 0), value=_NOTHING)[:, : end + count]
        return self.extended(kv, count), document[:, end - self.length :]

    def state(
        self,
        x: Float[Tensor, "b t d"],
        input_gate: Float[Tensor, "b t d"],
        a_gate: Float[Tensor, "b t d"],
        a_param: Float[Tensor, "d"],
        segment_pos: Int[Tensor, "b t"],
        implementation: str,
    ) -> Float[Tensor, "b d"]:
        """The recurrence's state before the own tokens.

        The last state is linear in the first: decay * first + last. Each process computes both from
        its tokens, all exchange them, and each applies those before it.
        """
        inputs = x, input_gate, a_gate, a_param, segment_pos
        _, last = rg_lru_scan(*inputs, implementation=implementation)
        gate, rate = (z.to(last.dtype) for z in (a_gate, a_param))
        log_a = -RG_LRU_C * softplus(rate) * torch.sigmoid(gate)
        decay = log_a.masked_fill((segment_pos < 0)[..., None], 0).sum(1).exp()
        decay = decay.masked_fill((segment_pos == 0).any(1)[:, None], 0)
        pairs = _Gathered.apply(torch.stack([decay, last]), self.group)
        state = torch.zeros_like(last)
        for index, (decay, last) in enumerate(pairs):  # pyright: ignore[reportGeneralTypeIssues]
            # Also those behind, without effect: every process computes the same gradients.
            is_before = torch.tensor(index < self.index, device=last.device)
            state = torch.where(is_before, decay * state + last, state)
        return state


class _Gathered(torch.autograd.Function):
    """The tensors of all processes, stacked."""

    @staticmethod
    def forward(ctx, x, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx[dist.get_rank(ctx.group)], None


class _Halo(torch.autograd.Function):
    """The tokens, so many, that stand before the own ones: zeros before the row."""

    @staticmethod
    def forward(ctx, x, count, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group, ctx.count, ctx.length = group, count, x.shape[1]
        halo = x.new_zeros(x.shape[0], count, *x.shape[2:])
        moves = _moves(ctx)
        received = _exchanged(
            group,
            [(to, x[:, x.shape[1] - size :]) for size, to, _, _ in moves],
            [(start, halo[:, part]) for _, _, start, part in moves],
        )
        for (_, _, _, part), tensor in zip(moves, received, strict=True):
            if tensor is not None:
                halo[:, part] = tensor
        return halo

    @staticmethod
    def backward(ctx, dhalo):  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = dhalo.new_zeros(dhalo.shape[0], ctx.length, *dhalo.shape[2:])
        moves = _moves(ctx)
        received = _exchanged(
            ctx.group,
            [(start, dhalo[:, part]) for _, _, start, part in moves],
            [(to, dx[:, ctx.length - size :]) for size, to, _, _ in moves],
        )
        for (size, _, _, _), tensor in zip(moves, received, strict=True):
            if tensor is not None:
                dx[:, ctx.length - size :] += tensor
        return dx, None, None


def _moves(ctx: Any) -> list[tuple[int, int | None, int | None, slice]]:
    """For each process before: tokens, whom they go to and come from, and where they are put."""
    index, count = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
    moves = []
    for hop in range(1, -(-ctx.count // ctx.length) + 1):
        size = min(ctx.length, ctx.count - (hop - 1) * ctx.length)
        end = ctx.count - (hop - 1) * ctx.length
        to = index + hop if index + hop < count else None
        start = index - hop if index >= hop else None
        moves.append((size, to, start, slice(end - size, end)))
    return moves


def _exchanged(
    group: Any, sent: list[tuple[int | None, Tensor]], received: list[tuple[int | None, Tensor]]
) -> list[Tensor | None]:
    """Sends tensors to processes and returns those that come, of the shapes of others."""
    results = [
        None if peer is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for peer, like in received
    ]
    moved: list[Any] = [(dist.isend, peer, tensor.contiguous()) for peer, tensor in sent]
    pairs = zip(received, results, strict=True)
    moved += [(dist.irecv, peer, result) for (peer, _), result in pairs]
    operations = [
        dist.P2POp(kind, tensor, dist.get_global_rank(group, peer), group)
        for kind, peer, tensor in moved
        if peer is not None
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return results
