"""The scan and the RG-LRU's small functions under their published names."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recurrentgemma.common.errors import UserError
from recurrentgemma.torch.scan.dispatch import linear_scan
from recurrentgemma.torch.scan.gates import BoundedSqrt as SqrtBoundDerivative

__all__ = ["SqrtBoundDerivative", "rnn_param_init", "rnn_scan"]


def rnn_scan(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    reset: Bool[Tensor, "b t"],
    h0: Float[Tensor, "b d"] | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """`linear_scan` with its published arguments: all states, and the last in `acc_dtype`."""
    y, last = linear_scan(x, a, h0, reset)
    return y, last.to(acc_dtype)


@torch.no_grad()
def rnn_param_init(
    tensor: Tensor, min_rad: float, max_rad: float, transform: str = "softplus", eps: float = 1e-8
) -> Tensor:
    """Fills an `a_param` so that exp(-softplus(a_param)) is uniform on a ring of the unit disk.

    Raises:
      ValueError: The transform is not "softplus".
    """
    if transform != "softplus":
        raise UserError(f"transform must be 'softplus', got {transform!r}")
    squared = torch.empty_like(tensor, dtype=torch.float32).uniform_(min_rad**2, max_rad**2)
    return tensor.copy_(torch.log(torch.expm1(-0.5 * torch.log(squared + eps))))
