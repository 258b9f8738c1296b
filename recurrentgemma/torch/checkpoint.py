"""Loading and saving checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recurrentgemma.common.arrays import DTYPES
from recurrentgemma.common.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.text import Tokenizer
from recurrentgemma.torch.arrays import to_array, to_tensor
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma_conversion.native import save_folder
from recurrentgemma_conversion.opening import open_checkpoint
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load_checkpoint(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sharding: DeviceMesh | None = None,
    overrides: Overrides = NO_OVERRIDES,
) -> Griffin:
    """The model in a checkpoint of any format; on the CPU a view of its mapped file where it can.

    Args:
      path: A folder, file or archive; the bundled model if None.
      dtype: Of the parameters and the computation; as stored if None.
      device: Where the parameters go; the CPU if None.
      sharding: The mesh over which they are split instead, block by block with `fully_shard`. Each
        process then reads the whole checkpoint and keeps its part, a tensor at a time.
      overrides: What the checkpoint does not say of the model, or says otherwise.

    Raises:
      CheckpointError: There is no checkpoint, or it cannot be served; see `open_checkpoint`.
      ValueError: There are both a device and a sharding.
    """
    if device is not None and sharding is not None:
        raise ValueError(f"give either a device or a sharding, got {device=} {sharding=}")
    with open_checkpoint(path, overrides) as checkpoint:
        model = Griffin(checkpoint.config, device="meta")
        if sharding is not None:
            _shard(model, sharding)
        places = model.state_dict()
        state = {}
        for spec, value in checkpoint:
            tensor = to_tensor(spec.torch.encode(value)).to(device or "cpu", dtype)
            place = places[spec.torch.name]
            state[spec.torch.name] = tensor if sharding is None else _part(tensor, place)
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
        return spec.torch.decode(to_array(state[spec.torch.name]), spec)

    save_folder(path, model.config, dtypes, parameter, tokenizer, force=force)


def _shard(model: Griffin, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _part(tensor: Tensor, place: Tensor) -> Tensor:
    """This process's part of a tensor that all have, split as the `DTensor` it is to replace."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(place, DTensor)
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def _numpy_dtype(tensor: Tensor) -> np.dtype:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]
