"""Loading and saving checkpoints."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from recurrentgemma.common.arrays import BFLOAT16, DTYPES
from recurrentgemma.common.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.text import Tokenizer
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma_conversion.native import save_folder
from recurrentgemma_conversion.opening import open_checkpoint
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides


def load_checkpoint(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    overrides: Overrides = NO_OVERRIDES,
) -> Griffin:
    """The model in a checkpoint of any format; on the CPU a view of its mapped file where it can.

    Args:
      path: A folder, file or archive; the bundled model if None.
      dtype: Of the parameters and the computation; as stored if None.
      device: Where the parameters go.
      overrides: What the checkpoint does not say of the model, or says otherwise.

    Raises:
      CheckpointError: There is no checkpoint, or it cannot be served; see `open_checkpoint`.
    """
    with open_checkpoint(path, overrides) as checkpoint:
        model = Griffin(checkpoint.config, device="meta")
        state = {
            spec.torch.name: _tensor(spec.torch.encode(value)).to(device, dtype)
            for spec, value in checkpoint
        }
    model.load_state_dict(state, assign=True)
    return model


def save_checkpoint(
    path: str | os.PathLike[str], model: Griffin, tokenizer: Tokenizer, *, force: bool = False
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Raises:
      CheckpointError: `path` exists and `force` is not set, or the disk has too little room.
    """
    state = model.state_dict()
    specs = layer_spec(model.config)
    dtypes = {spec.path: _numpy_dtype(state[spec.torch.name]) for spec in specs}

    def parameter(spec: ParamSpec) -> np.ndarray:
        return spec.torch.decode(_array(state[spec.torch.name]), spec)

    save_folder(path, model.config, dtypes, parameter, tokenizer, force=force)


def _tensor(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == BFLOAT16:  # which NumPy's half of PyTorch does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def _numpy_dtype(tensor: Tensor) -> np.dtype:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]
