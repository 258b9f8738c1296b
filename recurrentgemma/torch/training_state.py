"""A training state in a folder, written and read by all processes; and where its tensors are."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurrentgemma.common.errors import DamagedError, UserError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.model.layer_spec import layer_spec, require_match
from recurrentgemma.common.model.state_dict import to_torch, torch_name, torch_shape
from recurrentgemma.common.sharding import inherited
from recurrentgemma.common.training.lora import trainable_specs
from recurrentgemma.common.training.optimization import (
    OWN,
    OptimizerOptions,
    grouped,
    state_shapes,
)
from recurrentgemma.common.training.state_layout import Placed, StateLayout
from recurrentgemma.torch.optimizer import get_moments, set_moments
from recurrentgemma.torch.runtime.processes import processes_of
from recurrentgemma.torch.runtime.split_tensors import mesh_of, part_of, zeros
from recurrentgemma.torch.sharding import owners, reshard, sizes_of, splits_of

if TYPE_CHECKING:
    from recurrentgemma.torch.model import Model
    from recurrentgemma.torch.training import TrainState


def own_parameters(model: Model) -> dict[str, Tensor]:
    """The model's parameters by the layer spec's paths."""
    specs, tensors = layer_spec(model.config), model.state_dict(keep_vars=True)  # split by FSDP
    return {spec.path: tensors[torch_name(spec.path)] for spec in specs}


@torch.no_grad()
def copy_parameters(state: TrainState) -> None:
    """Casts the optimiser's copy of the parameters, where it has one, to the model's."""
    if state.lora is not None:
        return
    for path, parameter in own_parameters(state.model).items():
        if state.parameters[path] is not parameter:
            parameter.copy_(state.parameters[path])


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that training changes, in the Flax layout, split as the state is.

    See `state_arrays` for the names. Tensors are views of the state's where they can be.
    """
    specs = trainable_specs(state.model.config, state.lora)
    moments = get_moments(state.optimizer, specs, state.parameters, state.optimizer_state)
    values = {path: to_torch(path, value) for path, value in state.parameters.items()}
    return {"step": torch.tensor(state.step)} | {
        f"{group}.{path}": tensor.detach()
        for group, tensors in {"parameters": values, **moments}.items()
        for path, tensor in tensors.items()
    }


@torch.no_grad()
def load_state_tensors(state: TrainState, tensors: Mapping[str, Any]) -> TrainState:
    """The state with the tensors that `state_tensors` returned of a state like it."""
    groups: dict[str, Any] = {**grouped(tensors)}
    values, state.step = groups.pop("parameters"), int(tensors["step"])
    for path, parameter in state.parameters.items():
        parameter.copy_(part_of(to_torch(path, values[path]).to(parameter.dtype), parameter))
    set_moments(state.optimizer, state.step, groups, state.parameters, state.optimizer_state)
    copy_parameters(state)
    return state


def save_state(path: str | os.PathLike[str], state: TrainState, *, force: bool = False) -> None:
    """Writes a training state as a folder (PyTorch's DCP), whole or not at all.

    Where it is split all processes must call this together: each writes what it keeps, and the
    first gives the folder its name when all are done. It must be on a disk that all see.

    Args:
      path: The folder.
      state: The state.
      force: Whether to replace what is at `path`.

    Raises:
      CheckpointError: `path` exists and `force` is not set, or it cannot be written.
      OtherProcessError: Another process failed.
    """
    processes = processes_of(mesh_of(state.parameters.values()))
    with processes.folder(expanded(path), force=force) as folder:
        write_state(folder, state)


def write_state(folder: Path, state: TrainState) -> None:
    """Writes a training state into a folder, from all processes."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _perhaps_alone(state) as alone:
        save(state_tensors(state), storage_writer=FileSystemWriter(folder), no_dist=alone)


@contextlib.contextmanager
def _perhaps_alone(state: TrainState) -> Iterator[bool]:
    """Whether this process is alone, which DCP warns of even where it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield mesh_of(state.parameters.values()) is None


@torch.no_grad()
def load_state(path: str | os.PathLike[str], state: TrainState) -> TrainState:
    """The state that `save_state` wrote, on any number of processes; each reads its own parts.

    Args:
      path: The folder.
      state: A state of the same model, adapters and optimiser. Its values are replaced; they are
        of no use if this fails.

    Raises:
      ValueError: There is no training state at `path`, it is damaged, or its tensors are those of
        another model or optimiser; the message lists all differences.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = expanded(path)
    if not (folder / ".metadata").is_file():
        raise UserError(f"no training state at {folder}")
    reader = FileSystemReader(folder)
    try:
        stored: Any = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise DamagedError(f"{folder}: its .metadata cannot be read: {error}") from error
    specs = trainable_specs(state.model.config, state.lora)
    own = not isinstance(state.optimizer, OptimizerOptions)
    require_match(
        state_shapes(state.optimizer, specs),
        {
            name: tuple(tensor.size)
            for name, tensor in stored.items()
            if not (own and name.startswith(f"{OWN}."))
        },
    )
    wanted = {name: _place(state, name, tensor) for name, tensor in stored.items()}
    try:
        with _perhaps_alone(state) as alone:
            load(wanted, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise DamagedError(f"{folder} cannot be read: {first}") from error
    return load_state_tensors(state, wanted)


def _place(state: TrainState, name: str, stored: Any) -> Tensor:
    """A tensor into which a stored one is read, split as the parameter is that it belongs to."""
    group, _, path = name.partition(".")
    size, dtype = tuple(stored.size), stored.properties.dtype
    if group == OWN:  # in PyTorch's layout
        place = state.parameters.get(path.rpartition(".")[0])
        if place is None or tuple(place.shape) != size:
            return torch.zeros(size, dtype=dtype)
        return zeros(place, size).to(dtype)
    place = state.parameters.get(path)
    if place is None:
        return torch.zeros(size, dtype=dtype)
    return to_torch(path, zeros(place, torch_shape(path, size)))


def layout_of(state: TrainState) -> StateLayout:
    """How each tensor of a training state is split, as requested and in fact; see `StateLayout`."""
    reshard(state.model)
    mesh = mesh_of(state.parameters.values())
    splits = splits_of(state.model.config, mesh, state.lora)
    specs = (*layer_spec(state.model.config), *trainable_specs(state.model.config, state.lora))
    shapes = {spec.path: spec.shape for spec in specs}

    def tensors() -> Iterator[tuple[str, str, Tensor]]:
        for name, tensor in state_tensors(state).items():
            path = name.partition(".")[2]
            if path in shapes:
                yield name, path, tensor
        for name, path, tensor, by_rows in owners(state.model) if state.lora else ():
            if path not in state.parameters:
                part = name.rpartition(".")[2] if by_rows else "values"
                part = "" if part == "values" else f".{part}"  # as `Quantized.parts`
                yield f"base.{path}{part}", path, tensor.mT if by_rows else to_torch(path, tensor)

    return StateLayout(
        (name, _placed(tensor, inherited(splits[path], tuple(tensor.shape), shapes[path])))
        for name, path, tensor in tensors()
    )


def _placed(tensor: Any, requested: tuple[str | None, ...]) -> Placed:
    actual: list[str | None] = [None] * tensor.ndim
    mesh = mesh_of([tensor])
    if mesh is not None:
        for axis, place in zip(sizes_of(mesh), tensor.placements, strict=True):
            if place.is_shard() and sizes_of(mesh)[axis] > 1:
                actual[place.dim] = axis
    local = tensor if mesh is None else tensor.to_local()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Placed(tuple(tensor.shape), dtype, requested, tuple(actual), local.nbytes)
