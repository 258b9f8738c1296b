"""Matrices in the form in which products of several rows are fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurrentgemma.torch.runtime import kernels

_LEAST = 2**17  # values of a matrix
_LARGE = 2**20  # values of a matrix that is not held twice


def _least_rows(dtype: torch.dtype) -> int:
    """The number of rows from which packed values are faster: MKL is fast on an Intel CPU."""
    return 1 if dtype == torch.bfloat16 or kernels.plain32_gains() else 4


class PackedMatrix(nn.Module):
    """A matrix in oneDNN's layout, or a stack of them, in the place of a parameter.

    A large one is held in this form alone. Where gradients are enabled, each product makes the
    parameter again.

    Attributes:
      packed: The matrix, each of the stack, or one matrix with all outputs of the stack.
      plain: The parameter, for a few rows; None if the matrix is large, or they gain too.
      shape: The shape of the parameter.
      dtype: The dtype of the parameter: float32, or bfloat16.
      axis: The axis of inputs of the parameter; see `Quantized`.
    """

    def __init__(self, values: Tensor, axis: int, joined: bool = False) -> None:
        """Packs a parameter; `joined` if all matrices of its stack take the same rows."""
        super().__init__()
        self.shape, self.dtype, self.axis = values.shape, values.dtype, axis
        small = values.shape[-2] * values.shape[-1] < _LARGE
        self.plain = values if small and _least_rows(values.dtype) > 1 else None
        rows = values if axis == -1 else values.mT
        shape = (1, -1) if joined else (-1, rows.shape[-2])
        self.packed = [kernels.pack(w) for w in rows.reshape(*shape, rows.shape[-1])]

    ndim = property(lambda self: len(self.shape))
    nbytes = property(
        lambda self: self.dtype.itemsize * self.shape.numel() * (1 if self.plain is None else 2)
    )
    device = torch.device("cpu")

    def extra_repr(self) -> str:
        return f"packed {list(self.shape)}"

    def values(self) -> Tensor:
        """The parameter, made again if it is not held."""
        if self.plain is not None:
            return self.plain
        rows = torch.cat([kernels.unpack(w) for w in self.packed])
        rows = rows.view(*self.shape[:-2], -1, rows.shape[-1])
        return rows if self.axis == -1 else rows.mT

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.values()


def takes(x: Tensor, w: PackedMatrix) -> bool:
    """Whether rows go with the packed values, which have no derivative."""
    several = w.plain is None or x.numel() >= _least_rows(w.dtype) * x.shape[-1]
    return several and x.dtype == w.dtype and not torch.is_grad_enabled()


def gains(value: Any, rows: int) -> bool:
    """Whether products of so many rows with a parameter are faster if it is packed."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.is_cpu
        and value.ndim > 1
        and value.shape[-2] * value.shape[-1] >= _LEAST
        and value.dtype in (torch.float32, torch.bfloat16)
        and rows >= _least_rows(value.dtype)
        and (kernels.packed32_works() if value.dtype == torch.float32 else kernels.packed16_gains())
    )
