"""How a PyTorch module holds a parameter: by its path, except that a `kernel` is a `weight`.

`torch.nn.Linear` stores the transpose of a Flax kernel under the name `weight`. Every other
parameter has the same name and the same axes in both frameworks.
"""

from __future__ import annotations

from typing import Any, TypeVar

_T = TypeVar("_T")


def is_kernel(path: str) -> bool:
    """Whether PyTorch stores the parameter transposed, under `weight`."""
    return path.rpartition(".")[2] == "kernel"


def torch_name(path: str) -> str:
    """The name in a state dict of the parameter at a spec's path."""
    return path.removesuffix("kernel") + "weight" if is_kernel(path) else path


def to_torch(path: str, value: Any) -> Any:
    """The array that PyTorch stores, from the array in the Flax layout; its own inverse."""
    return value.swapaxes(-1, -2) if is_kernel(path) else value


def torch_shape(path: str, shape: tuple[_T, ...]) -> tuple[_T, ...]:
    """The shape, or what each axis has, in PyTorch's layout from Flax's; its own inverse."""
    return (*shape[:-2], shape[-1], shape[-2]) if is_kernel(path) else shape


def flax_path(name: str) -> str:
    """The spec's path of the parameter with a name in a state dict; the inverse of `torch_name`."""
    is_weight = name.rpartition(".")[2] == "weight"
    return name.removesuffix("weight") + "kernel" if is_weight else name
