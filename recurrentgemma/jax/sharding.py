"""How arrays lie on a mesh of devices; `common.sharding` says which axis splits what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, Device
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from recurrentgemma.common import sharding as layouts
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config, Layer
from recurrentgemma.common.model.layer_spec import layer_params
from recurrentgemma.common.quantization import Quantized
from recurrentgemma.common.training.lora import LoraOptions

AxisName = str | tuple[str, ...] | None
TokenSplit = tuple[tuple[str, ...], tuple[str, ...]]


class ShardingSpec(NamedTuple):
    """Which mesh axes the scan's [B, T, D] arrays are split over.

    Batch and width split without communication; see `ShardedScan` for the sequence. A single step
    is never split. Sizes that the mesh does not divide get padding, which costs its share of time
    and changes nothing. On a mesh with explicit axes, outputs are sharded like x.

    Attributes:
      mesh: The devices; None if each device already holds its part, as under `jax.pmap`.
      batch_axis_name: Mesh axis, or axes, of the batch.
      sequence_axis_name: Mesh axis of the sequence.
      activations_axis_name: Mesh axis, or axes, of the width.
    """

    mesh: Mesh | None = None
    batch_axis_name: AxisName = None
    sequence_axis_name: str | None = None
    activations_axis_name: AxisName = None

    @property
    def activations_sharding_spec(self) -> PartitionSpec:
        """The partition of [B, T, D] arrays."""
        return PartitionSpec(
            self.batch_axis_name, self.sequence_axis_name, self.activations_axis_name
        )

    @property
    def activations_sharding(self) -> NamedSharding:
        """The sharding of [B, T, D] arrays."""
        return self._sharding(self.activations_sharding_spec)

    @property
    def rnn_state_sharding_spec(self) -> PartitionSpec:
        """The partition of [B, D] states."""
        return PartitionSpec(self.batch_axis_name, self.activations_axis_name)

    @property
    def rnn_state_sharding(self) -> NamedSharding:
        """The sharding of [B, D] states."""
        return self._sharding(self.rnn_state_sharding_spec)

    def _sharding(self, partition: PartitionSpec) -> NamedSharding:
        if self.mesh is None:
            raise UserError("a sharding needs ShardingSpec's mesh, got None")
        return NamedSharding(self.mesh, partition)


def make_mesh(
    mesh: str | Mapping[str, int],
    devices: Sequence[Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh that a text such as "fsdp=4,tensor=2" names.

    Args:
      mesh: The text, or the sizes by axis; see `common.sharding`.
      devices: All devices of all processes if None. A mesh of fewer takes the first.

    Raises:
      ValueError: The text is wrong, there are too few devices, or the mesh is no strategy.
    """
    devices = jax.devices() if devices is None else devices
    text = mesh if isinstance(mesh, str) else layouts.mesh_text(mesh)
    sizes = layouts.parse_mesh(text, len(devices))
    layouts.strategy(sizes)
    shape = tuple(sizes.values())
    chosen = np.array(devices[: int(np.prod(shape))]).reshape(shape)
    return automatic_mesh(Mesh(chosen, tuple(sizes)))


@functools.lru_cache
def automatic_mesh(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes: types of arrays do not say how they are split."""
    if mesh.size > 1:
        compile_anew_on_cpu(mesh.devices.flat[0].platform)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def compile_anew_on_cpu(platform: str) -> None:
    """Turns JAX's compilation cache off if the platform is "cpu", until the process ends.

    On several CPU devices, a program that JAX 0.10.2 reads from its cache can wait forever in an
    exchange of arrays.
    """
    if platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX looks at the setting once


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """The sizes of a mesh by axis."""
    return dict(mesh.shape)


def on_mesh(mesh: Mesh, *split: AxisName) -> NamedSharding:
    """The sharding of an array whose axes are split so."""
    return NamedSharding(mesh, PartitionSpec(*split))


def shardings(
    config: Config, mesh: Mesh, lora: LoraOptions | None = None, own: layouts.Rules = ()
) -> dict[str, NamedSharding]:
    """The sharding of each parameter, by path; with `lora` of the adapters, too.

    Args:
      config: The model.
      mesh: The mesh.
      lora: Adapters beside the parameters, if any.
      own: Rules that come before those of `common.sharding.layout`.

    Raises:
      ValueError: The mesh does not fit the model.
    """
    splits = layouts.layout(config, sizes_of(mesh), lora, own)
    return {path: on_mesh(mesh, *split) for path, split in splits.items()}


def token_split(mesh: Mesh | None, rows: int, length: int) -> TokenSplit:
    """The mesh axes that split so many rows, and so many tokens of a row.

    Those that do not divide them split nothing.
    """
    if mesh is None:
        return (), ()
    sizes = sizes_of(mesh)
    axes = layouts.activation_layout(sizes)
    batch, time = (
        axes[name] if number % layouts.share(axes[name], sizes) == 0 else ()
        for name, number in (("batch", rows), ("time", length))
    )
    return batch, time


def splits_steps(mesh: Mesh | None) -> bool:
    """Whether a mesh splits the tokens of a row, beside the rows."""
    return mesh is not None and mesh.shape.get("sequence", 1) > 1


def constrained(x: Array, mesh: Mesh | None, split: TokenSplit) -> Array:
    """An activation [B, T, ...] whose tokens are split so; as it is where there is no mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, on_mesh(automatic_mesh(mesh), *split))


def scan_split(mesh: Mesh, split: TokenSplit) -> ShardingSpec:
    """How the linear recurrence over tokens that are split so is split."""
    (width,) = layouts.activation_layout(sizes_of(mesh))["lru"] or (None,)
    batch, time = split
    return ShardingSpec(mesh, batch or None, time[0] if time else None, width)


def state_shardings(config: Config, mesh: Mesh, rows: int) -> dict[str, Any]:
    """The shardings of a state of so many rows, in the structure of a state."""
    places: dict[str, dict[str, NamedSharding]] = {}
    for path, split in layouts.state_layout(config, sizes_of(mesh), rows).items():
        block, _, field = path.rpartition(".")
        places.setdefault(block, {})[field] = on_mesh(automatic_mesh(mesh), *split)
    kinds = (layer.mixer.cache for layer in config.model.layers)
    return {
        block: kind(**fields) for (block, fields), kind in zip(places.items(), kinds, strict=True)
    }


@functools.lru_cache
def gathering(mesh: Mesh, width: int, layer: Layer) -> Callable[[Any], Any]:
    """From the variables of a block, split as at rest, to those that it computes with.

    There only "tensor" splits them. The gradients are split as at rest again.
    """

    def gather(leaf: Array, split: Callable[..., layouts.Split]) -> Array:
        rest = split(leaf.shape)
        computed = (axis if axis == "tensor" else None for axis in rest)
        automatic = automatic_mesh(mesh)
        return _gathered(leaf, on_mesh(automatic, *rest), on_mesh(automatic, *computed))

    change = _on_parameters(mesh, width, layer, gather)
    return lambda variables: {name: change(tree) for name, tree in variables.items()}


@functools.lru_cache
def stack_at_rest(mesh: Mesh, width: int, layer: Layer) -> Callable[[Any], Any]:
    """Splits the stacked parameters of several blocks, and their gradients, as each is at rest."""

    def constrain(leaf: Array, split: Callable[..., layouts.Split]) -> Array:
        place = on_mesh(automatic_mesh(mesh), None, *split(leaf.shape[1:]))
        return jax.lax.with_sharding_constraint(leaf, place)

    return _on_parameters(mesh, width, layer, constrain)


def _on_parameters(
    mesh: Mesh, width: int, layer: Layer, change: Callable[[Array, Callable[..., Any]], Array]
) -> Callable[[Any], Any]:
    """Changes each array of a block's parameters; `change` gets what splits a shape at rest."""
    sizes, parts = sizes_of(mesh), getattr(layer.mixer, "parts", None)
    specs = {spec.path: spec for spec in layer_params(width, layer, 1.0)}
    splits = {path: layouts.split_of(spec, sizes, parts=parts) for path, spec in specs.items()}

    def changed(path: str, leaf: Array, by_rows: bool = False) -> Array:
        return change(
            leaf, lambda shape: _split_beside(splits[path], shape, specs[path].shape, by_rows)
        )

    def change_all(tree: Any, prefix: str = "") -> Any:
        if isinstance(tree, Quantized):
            by_rows = tree.axis == -2
            return tree.with_parts(lambda part: changed(prefix[1:], part, by_rows))
        if isinstance(tree, tuple):  # a matrix and its adapter
            return type(tree)(*(change_all(part, prefix) for part in tree))
        if not isinstance(tree, Mapping):
            return jax.tree.map(functools.partial(changed, prefix[1:]), tree)
        return {key: change_all(value, f"{prefix}.{key}") for key, value in tree.items()}

    return change_all


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Array, rest: NamedSharding, computed: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, computed)


_gathered.defvjp(
    lambda x, rest, computed: (_gathered(x, rest, computed), None),
    lambda rest, computed, _, dx: (jax.lax.with_sharding_constraint(dx, rest),),
)


def put(array: Any, place: NamedSharding, dtype: Any = None) -> Array:
    """An array of the host on its devices: each process gives what its devices keep, cast."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype)
    return jax.make_array_from_callback(
        array.shape, place, lambda index: np.asarray(array[index], dtype)
    )


def local_slices(place: Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest part of an array that holds what this process's devices keep."""
    bounds = [
        [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        for index in place.addressable_devices_indices_map(shape).values()
        if index is not None
    ]
    pairs = (zip(*axis, strict=True) for axis in zip(*bounds, strict=True))
    return tuple(slice(min(starts), max(stops)) for starts, stops in pairs)


def put_part(part: Any, place: NamedSharding, shape: tuple[int, ...]) -> Array:
    """An array on its devices from the `local_slices` of it."""
    begins = [kept.start for kept in local_slices(place, shape)]
    dtype = jax.dtypes.canonicalize_dtype(part.dtype)

    def piece(index: Any) -> np.ndarray:
        bounds = (i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        moved = (slice(i - b, j - b) for (i, j), b in zip(bounds, begins, strict=True))
        return np.asarray(part[tuple(moved)], dtype)

    return jax.make_array_from_callback(shape, place, piece)


def is_split(array: Any) -> bool:
    """Whether an array lies on a mesh."""
    return isinstance(array, Array) and isinstance(array.sharding, NamedSharding)


def place_beside(array: Array, shape: tuple[int, ...], by_rows: bool = False) -> NamedSharding:
    """The sharding of what belongs to a split parameter, a moment or a scale, of this shape.

    With `by_rows` its last two axes are those of the parameter, swapped; see `Quantized`.
    """
    place: Any = array.sharding
    split = (*place.spec, *(None,) * (array.ndim - len(place.spec)))
    if len(shape) != array.ndim:
        return on_mesh(place.mesh)
    return on_mesh(place.mesh, *_split_beside(split, shape, array.shape, by_rows))


def _split_beside(
    split: layouts.Split, shape: tuple[int, ...], whole: tuple[int, ...], by_rows: bool
) -> layouts.Split:
    if by_rows:
        split, whole = (*split[:-2], *split[:-3:-1]), (*whole[:-2], *whole[:-3:-1])
    return layouts.inherited(split, shape, whole)


def on_host(array: Any) -> np.ndarray:
    """The whole of an array; where processes hold parts, all must call this together."""
    if not isinstance(array, Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))


def row_parts(mesh: Mesh) -> tuple[list[int], int]:
    """Which equal parts of a batch's rows this process holds, and how many there are."""
    sizes = sizes_of(mesh)
    axes = layouts.activation_layout(sizes)["batch"]
    places = [mesh.axis_names.index(axis) for axis in axes]
    shape = [sizes[axis] for axis in axes]
    held = {
        int(np.ravel_multi_index([place[i] for i in places], shape)) if axes else 0
        for place, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    }
    return sorted(held), layouts.share(axes, sizes)


def rows_on_mesh(mesh: Mesh, array: Any) -> Array:
    """This process's rows of a batch, [..., B, T], as part of the rows of all processes.

    Processes whose devices hold the same rows, or other tokens of them, give the same ones. An
    array of JAX that lies on a mesh is the whole batch.

    Raises:
      ValueError: The mesh does not divide the rows, or the tokens of a row.
    """
    if is_split(array):
        return array
    held, parts = row_parts(mesh)
    *stack, rows, length = array.shape
    if rows % len(held):
        raise UserError(
            f"the rows of a batch must be divisible by {layouts.mesh_text(sizes_of(mesh))}: "
            f"{len(held)} of its {parts} parts are this process's, got {rows} rows"
        )
    layouts.require_length(sizes_of(mesh), length)
    each, array = rows // len(held), np.asarray(array)
    shape = (*stack, each * parts, length)
    place = on_mesh(mesh, *(None,) * len(stack), *token_split(mesh, *shape[-2:]))

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[-2].indices(shape[-2])
        moved = each * held.index(start // each) - start if each else 0
        return array[(*index[:-2], slice(start + moved, stop + moved), index[-1])]

    return jax.make_array_from_callback(shape, place, piece)
