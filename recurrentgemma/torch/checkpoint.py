"""Loading and saving checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.arrays import float_dtype
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name, torch_shape
from recurrentgemma.common.quantization import Quantized, input_axis, scheme_of
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.quantization import QuantizedMatrix, replace, state_of
from recurrentgemma.torch.runtime.arrays import to_array, to_tensor
from recurrentgemma.torch.runtime.processes import by_the_first
from recurrentgemma.torch.runtime.split_tensors import local_slices, mesh_of, placed
from recurrentgemma.torch.sharding import shard
from recurrentgemma_conversion.formats import Tensor as Held
from recurrentgemma_conversion.names import torch_layout
from recurrentgemma_conversion.opening import open_checkpoint
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides
from recurrentgemma_conversion.readers.native import save_folder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load_checkpoint(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    mesh: DeviceMesh | None = None,
    config: Config | None = None,
    overrides: Overrides = NO_OVERRIDES,
    adapter: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
) -> Model:
    """The model in a checkpoint of any format.

    On the CPU its parameters are views of the mapped file where they can be: stored as PyTorch has
    them, and not cast. Writing over that file in place changes them; replacing it, as
    `save_checkpoint` does, does not.

    Args:
      path: A folder, file or archive, or the name of a bundled model: "tiny", which None means too,
        or "tiny-chat".
      dtype: The dtype of the parameters and the computation. If None each parameter keeps its
        stored dtype; but where the factors of matrix products are stored in several, these are
        float32 or wider. Matrices of a GGUF with quantised weights are bfloat16.
      device: Where the parameters go; the CPU if None.
      mesh: The processes over which they are split instead (see `make_mesh`). Each reads its part
        of every tensor, one at a time.
      config: What the model is, for weights without a `config.json`; it wins over one.
      overrides: What else the caller says of the model.
      adapter: LoRA adapters that are added to the parameters as they are read: a file of ours or
        its folder, or a folder of PEFT's.
      quantize: "q8", "q4" or "q4_32": the scheme in which matrices are kept (see
        `common.quantization`), quantised as they are read, one at a time. If None they are as they
        are stored.

    Raises:
      CheckpointError: There is no checkpoint, or it cannot be served, or the adapters cannot; see
        `open_checkpoint`. Or it is stored in another scheme.
      ValueError: There are both a device and a mesh, parameters cannot be of the dtype, or what is
        to be split has several or is quantised; the mesh does not fit the model; or the scheme is
        unknown, or does not fit a matrix, which the message names.
      RuntimeError: It is to be split, and PyTorch is older than 2.10.
    """
    if device is not None and mesh is not None:
        raise UserError(f"give either a device or a mesh, got {device=} {mesh=}")
    if config is not None:
        overrides = overrides._replace(config=config)
    with open_checkpoint(path, overrides, adapter=adapter) as checkpoint:
        stored = sorted({dtype.name for dtype in checkpoint.dtypes.values()})
        if mesh is not None and dtype is None and len(stored) > 1:
            raise UserError(
                f"what is split must be of one dtype, got {', '.join(stored)}; pass dtype"
            )
        model = Model(checkpoint.config, device="meta")
        if mesh is not None:
            shard(model, mesh)
        places: dict[str, Any] = model.state_dict()

        def part(spec: ParamSpec, value: np.ndarray) -> np.ndarray:
            return value[torch_shape(spec.path, local_slices(places[torch_name(spec.path)]))]

        state = {}
        wanted = None if dtype is None else float_dtype(dtype)
        for spec, on_host in checkpoint.read_as(wanted, quantize, None if mesh is None else part):
            if isinstance(on_host, Quantized):
                held = on_host.with_parts(lambda part: to_tensor(part).to(device or "cpu"))
                replace(model, spec, held)
                continue
            name = torch_name(spec.path)
            tensor = to_tensor(to_torch(spec.path, on_host))
            state[name] = placed(tensor, places[name]) if mesh else tensor.to(device or "cpu")
    model.load_state_dict(model.state_dict() | state, assign=True)
    return model


def save_checkpoint(
    path: str | os.PathLike[str], model: Model, tokenizer: Any, *, force: bool = False
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Where the model is split over processes all must call this; the first of them writes, a tensor
    at a time.

    Args:
      path: The folder to make.
      model: The model.
      tokenizer: Its tokenizer: a `Tokenizer`, or what it takes, such as a path.
      force: Whether to replace what is at `path`.

    Raises:
      CheckpointError: `path` exists and `force` is not set, the disk has too little room, the
        parameters do not match the config (all that are wrong are named), or the tokenizer is
        of another size than the vocabulary.
      OtherProcessError: It is split, and another process could not write.
    """
    state = state_of(model)
    specs = layer_spec(model.config)
    held = {name: Held.of(value) for name, value in state.items()}
    dtypes = torch_layout(specs).dtypes(path, held)
    scheme = scheme_of(v.quantized for v in state.values() if isinstance(v, QuantizedMatrix))
    values = {spec.path: state[torch_name(spec.path)] for spec in specs}
    tensors = (value for value in values.values() if isinstance(value, Tensor))

    def write(tensors: Iterable[Tensor]) -> None:
        arrays = map(to_array, tensors)

        def parameter(spec: ParamSpec) -> np.ndarray | Quantized:
            value = values[spec.path]
            if isinstance(value, QuantizedMatrix):
                return value.quantized.with_parts(to_array).replace(axis=input_axis(spec))
            return to_torch(spec.path, next(arrays))

        save_folder(path, model.config, dtypes, parameter, tokenizer, force=force, scheme=scheme)

    by_the_first(mesh_of(v for v in values.values() if isinstance(v, Tensor)), tensors, write)
