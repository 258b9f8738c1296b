"""Adafactor on tensors that are split over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurrentgemma.torch.runtime.split_tensors import inherited, moved, whole, zeros


class SplitAdafactor(torch.optim.Adafactor):
    """`torch.optim.Adafactor` on split tensors, which its own operations in place do not take.

    The averages of rows and columns are split as the parameter is, along the axis they share.
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

    def average(name: str, value: Tensor) -> Tensor:
        if name not in state:
            state[name] = zeros(p, value.shape)
        return state[name].lerp_(value, moves)

    rate = max(eps2, _norm(p) / p.numel() ** 0.5) * min(lr, step**-0.5)
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    if grad.ndim > 1:
        row = average("row_var", _mean_square(grad, -1))
        column = average("col_var", _mean_square(grad, -2))
        mean: Any = row.mean(-2, keepdim=True)
        mean = moved(mean, inherited(p, mean.shape))
        variance = row * column / mean.clamp(min=eps1)
    else:
        variance = average("variance", grad * grad)
    update = variance.clamp(min=eps1 * eps1).rsqrt() * grad
    p.add_(update, alpha=-rate / max(1.0, _norm(update) / (update.numel() ** 0.5 * group["d"])))


def _norm(z: Tensor) -> float:
    return float(whole(torch.linalg.vector_norm(z)))


def _mean_square(grad: Any, axis: int) -> Tensor:
    """The mean of the squares over an axis, split as the gradient is along the others."""
    split: Any = torch.linalg.vector_norm(grad, dim=axis, keepdim=True)
    norm = moved(split, inherited(grad, split.shape))
    return norm.square() / grad.shape[axis]
