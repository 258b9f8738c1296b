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
