"""NumPy arrays to tensors and back, bit for bit, also in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrentgemma.common.io.arrays import BFLOAT16


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the CPU. It shares the array's memory if that is contiguous."""
    array = np.asarray(array, order="C")  # unlike `ascontiguousarray`, it leaves a scalar one
    if array.dtype == BFLOAT16:  # PyTorch's `from_numpy` does not know it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> np.ndarray:
    """An array. It shares the tensor's memory if that is contiguous and on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def as_dtype(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in a dtype; a call of `to` takes as long as a small sum where nothing changes."""
    return tuple(z if z.dtype == dtype else z.to(dtype) for z in tensors)


def as_index(z: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """On a device, in a dtype that torch indexes with and that no position overflows.

    An array is copied, as it may be read-only or strided in ways that torch is not.
    """
    tensor = (z if isinstance(z, Tensor) else torch.from_numpy(np.array(z))).to(device)
    return tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.long()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keeps products in the dtype of their factors, under `torch.autocast` too."""
    kind = device.type
    # Dynamo does not trace `torch.amp.is_autocast_available` in PyTorch 2.6 to 2.10.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def map_cache(function: Callable[..., Tensor], cache: Any, *others: Any) -> Any:
    """The results of a function for each array of caches, or for single arrays."""
    if isinstance(cache, Tensor):
        return function(cache, *others)
    return {
        name: type(block)(*map(function, block, *(other[name] for other in others)))
        for name, block in cache.items()
    }
