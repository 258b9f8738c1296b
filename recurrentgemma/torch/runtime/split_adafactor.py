"""Adafactor on tensors that are split over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


class SplitAdafactor(torch.optim.Adafactor):
    """`torch.optim.Adafactor` on split tensors, which its own operations in place do not take.

    A row's or a column's average is split as the parameter is along the axis that they share.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update(p: Any, grad: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of one parameter; see `OptimizerOptions` for the arithmetic."""
    eps1, eps2 = group["eps"]
    state["step"] = state.get("step", torch.tensor(0.0)) + 1
    step, lr = float(state["step"]), float(group["lr"])
    moves = step ** group["beta2_decay"]
    rate = max(eps2, _norm(p) / p.numel() ** 0.5) * min(lr, step**-0.5)
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    if grad.ndim > 1:
        row, column = (
            state[name].lerp_(value, moves)
            if name in state
            else state.setdefault(name, value * moves)
            for name, value in (("row_var", _mean(grad, -1)), ("col_var", _mean(grad, -2)))
        )
        mean = row.mean(-2, keepdim=True).clamp(min=eps1).full_tensor()
        mean = DTensor.from_local(mean, p.device_mesh, [Replicate()] * p.device_mesh.ndim)
        variance = row * column / mean
    else:
        if "variance" not in state:
            state["variance"] = torch.zeros_like(p)
        variance = state["variance"].lerp_(grad * grad, moves)
    update = variance.clamp(min=eps1 * eps1).rsqrt() * grad
    p.add_(update, alpha=-rate / max(1.0, _norm(update) / (update.numel() ** 0.5 * group["d"])))


def _norm(z: Tensor) -> float:
    return float(torch.linalg.vector_norm(z).full_tensor())  # pyright: ignore[reportAttributeAccessIssue]


def _mean(grad: Any, axis: int) -> Tensor:
    """The mean of the squares over an axis, split as the gradient is along the others."""
    norm = torch.linalg.vector_norm(grad, dim=axis, keepdim=True)
    reduced = Shard(axis % grad.ndim)
    places = [Replicate() if place == reduced else place for place in grad.placements]
    return norm.redistribute(placements=places).square() / grad.shape[axis]
