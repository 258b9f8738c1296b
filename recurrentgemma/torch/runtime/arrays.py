"""NumPy arrays to tensors and back, bit for bit, also in bfloat16."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recurrentgemma.common.io.arrays import BFLOAT16


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the CPU. It shares the array's memory if that is contiguous."""
    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:  # PyTorch's `from_numpy` does not know it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> np.ndarray:
    """An array. It shares the tensor's memory if that is contiguous and on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def is_integer(z: Tensor | np.ndarray) -> bool:
    """Whether it holds integers, and no truth values."""
    if not isinstance(z, Tensor):
        return z.dtype.kind in "iu"
    return not (z.dtype == torch.bool or z.is_floating_point() or z.is_complex())


def as_index(z: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """On a device, in a dtype that torch indexes with and that no position overflows."""
    tensor = (z if isinstance(z, Tensor) else torch.from_numpy(z)).to(device)
    return tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.long()
