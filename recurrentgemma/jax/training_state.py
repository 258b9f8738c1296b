"""A training state in a folder, written and read by all processes; and where its arrays are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.model.layer_spec import layer_spec, require_match
from recurrentgemma.common.quantization import Quantized
from recurrentgemma.common.sharding import inherited
from recurrentgemma.common.training.lora import trainable_specs
from recurrentgemma.common.training.optimization import given_shapes, grouped, state_shapes
from recurrentgemma.common.training.state_layout import Placed, StateLayout
from recurrentgemma.jax.optimizer import cast, get_moments, set_moments
from recurrentgemma.jax.runtime.processes import processes_of
from recurrentgemma.jax.runtime.trees import get_path
from recurrentgemma.jax.sharding import is_split, put, shardings

if TYPE_CHECKING:
    from recurrentgemma.jax.training import TrainState


def state_tensors(state: TrainState) -> dict[str, Any]:
    """Everything that training changes, split as the state is; see `state_arrays` for the names."""
    specs = trainable_specs(state.model.config, state.lora)
    moments = get_moments(state.optimizer, specs, state.optimizer_state)
    values = {spec.path: state.parameters[spec.path] for spec in specs}
    return {"step": np.asarray(state.step)} | {
        f"{group}.{path}": array
        for group, arrays in {"parameters": values, **moments}.items()
        for path, array in arrays.items()
    }


def load_state_tensors(state: TrainState, tensors: Mapping[str, Any]) -> TrainState:
    """The state with the arrays that `state_tensors` returned of a state like it, cast."""
    specs = trainable_specs(state.model.config, state.lora)
    dtype = next(iter(state.parameters.values())).dtype
    moments, step = grouped(tensors), int(tensors["step"])
    values = moments.pop("parameters")
    parameters = {spec.path: cast(values[spec.path], dtype) for spec in specs}
    optimizer_state = set_moments(state.optimizer, state.optimizer_state, step, moments)
    return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        step=step,
        parameters=_placed_like(parameters, state.parameters),
        optimizer_state=_placed_like(optimizer_state, state.optimizer_state),
    )


def save_state(path: str | os.PathLike[str], state: TrainState, *, force: bool = False) -> None:
    """Writes a training state as a folder (Orbax), whole or not at all.

    Where it is split all processes must call this together: each writes what it keeps, and the
    first gives the folder its name when all are done. It must be on a disk that all see.

    Args:
      path: The folder.
      state: The state.
      force: Whether to replace what is at `path`.

    Raises:
      CheckpointError: `path` exists and `force` is not set.
    """
    processes = processes_of(state.model.mesh)
    with processes.folder(expanded(path).absolute(), force=force) as folder:
        write_state(folder / "it", state)  # beside which Orbax writes, too
        if processes.is_first:
            for file in (folder / "it").iterdir():
                file.rename(folder / file.name)
            (folder / "it").rmdir()


def write_state(folder: Path, state: TrainState) -> None:
    """Writes a training state as a new folder, from all processes."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state_tensors(state))


def load_state(path: str | os.PathLike[str], state: TrainState) -> TrainState:
    """The state that `save_state` wrote, on any mesh; each process reads its own parts.

    Args:
      path: The folder.
      state: A state of the same model, adapters and optimiser, whose values are replaced.

    Raises:
      ValueError: There is no training state at `path`, or its arrays are those of another model or
        optimiser; the message lists all differences.
    """
    import orbax.checkpoint as ocp

    folder = expanded(path).absolute()
    if not (folder / "_METADATA").is_file():
        raise UserError(f"no training state at {folder}")
    specs = trainable_specs(state.model.config, state.lora)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(folder)
        stored = getattr(metadata, "item_metadata", metadata)
        stored = dict(getattr(stored, "tree", stored))
        require_match(state_shapes(state.optimizer, specs), given_shapes(state.optimizer, stored))
        wanted = {name: _abstract(array) for name, array in state_tensors(state).items()}
        tensors = checkpointer.restore(folder, wanted)
    return load_state_tensors(state, tensors)


def layout_of(state: TrainState) -> StateLayout:
    """How each array of a training state is split, as requested and in fact; see `StateLayout`.

    Raises:
      ValueError: The state's model has no mesh.
    """
    model = state.model
    if model.mesh is None:
        raise UserError("a layout needs a model on a mesh, got mesh=None")
    places = shardings(model.config, model.mesh, state.lora)
    specs = (*layer_spec(model.config), *trainable_specs(model.config, state.lora))
    shapes = {spec.path: spec.shape for spec in specs}

    def arrays() -> Iterator[tuple[str, str, Any, bool]]:
        for name, array in state_tensors(state).items():
            path = name.partition(".")[2]
            if path in shapes:
                yield name, path, array, False
        for spec in layer_spec(model.config) if state.base is not None else ():
            assert state.base is not None
            leaf = get_path(state.base, spec.path)
            is_quantized = isinstance(leaf, Quantized)
            for part, array in leaf.parts.items() if is_quantized else [("", leaf)]:
                by_rows = is_quantized and leaf.axis == -2
                yield f"base.{spec.path}{part}", spec.path, array, by_rows

    def placed(path: str, array: Any, by_rows: bool) -> Placed:
        wanted = (*places[path].spec, *(None,) * (array.ndim - len(places[path].spec)))
        actual: Any = array.sharding.spec if is_split(array) else ()
        actual, shape = (*actual, *(None,) * (array.ndim - len(actual))), tuple(array.shape)
        if by_rows:
            actual, shape = (*actual[:-2], *actual[:-3:-1]), (*shape[:-2], *shape[:-3:-1])
        requested = inherited(wanted, shape, shapes[path])
        num_bytes = array.addressable_shards[0].data.nbytes
        return Placed(shape, str(array.dtype), requested, actual, num_bytes)

    return StateLayout(
        (name, placed(path, array, by_rows)) for name, path, array, by_rows in arrays()
    )


def _abstract(array: Any) -> Any:
    """What Orbax must know of an array to read it where it belongs."""
    if not isinstance(array, Array):
        return np.zeros_like(array)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _placed_like(new: Any, old: Any) -> Any:
    """The arrays of a tree, placed where another tree's are."""

    def placed(x: Any, y: Any) -> Array:
        if is_split(x):
            return x
        if is_split(y) and not jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            return put(np.asarray(x), y.sharding)
        x = jnp.array(x)
        return jax.device_put(x, y.sharding) if getattr(y, "committed", False) else x

    return jax.tree.map(placed, new, old)
