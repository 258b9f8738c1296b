"""Loading and saving checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Device
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.arrays import float_dtype
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.quantization import Quantized, scheme_of
from recurrentgemma.conversion import flatten_nested_dict
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.runtime.processes import by_the_first, processes_of
from recurrentgemma.jax.runtime.stored import as_stored
from recurrentgemma.jax.runtime.trees import Params, get_path, require_available, set_path
from recurrentgemma.jax.sharding import is_split, local_slices, put_part
from recurrentgemma.jax.sharding import shardings as shardings_of
from recurrentgemma_conversion.formats import Tensor as Held
from recurrentgemma_conversion.names import flax_layout
from recurrentgemma_conversion.opening import open_checkpoint, open_headers
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides
from recurrentgemma_conversion.readers.base import Reader
from recurrentgemma_conversion.readers.native import save_folder


def load_checkpoint(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: Dtype | None = None,
    device: Device | None = None,  # pyright: ignore[reportInvalidTypeForm]  # it is a class
    sharding: str | Sharding | Mapping[str, Any] = "single_device",
    mesh: Mesh | None = None,
    config: Config | None = None,
    overrides: Overrides = NO_OVERRIDES,
    adapter: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    decoding: bool = False,
) -> tuple[Model, Params]:
    """The model in a checkpoint of any format, and its parameters.

    On the CPU these are views of its mapped file where they can be: uncompressed, not cast, their
    axes in the order of JAX. Writing over that file in place changes them; replacing it, as
    `save_checkpoint` does, does not.

    Args:
      path: A folder, file or archive, or the name of a bundled model: "tiny", which None means too,
        or "tiny-chat".
      dtype: The dtype of the parameters and the computation. If None each parameter keeps its
        stored dtype; but where the factors of matrix products are stored in several, these are
        float32 or wider, and float64 becomes float32 where JAX has it turned off. Matrices of a
        GGUF with quantised weights are bfloat16.
      device: Where the parameters go; the first if None.
      sharding: How they are split over several devices instead: see `load_parameters`.
      mesh: The devices that the model is split over (see `make_mesh`), each parameter as
        `common.sharding.layout` says; each process reads its parts of every tensor, one at a time.
      config: What the model is, for weights without a `config.json`; it wins over one.
      overrides: What else the caller says of the model.
      adapter: LoRA adapters that are added to the parameters as they are read: a file of ours or
        its folder, or a folder of PEFT's.
      quantize: "q8", "q4" or "q4_32": the scheme in which matrices are kept (see
        `common.quantization`), quantised as they are read, one at a time. If None they are as they
        are stored.
      decoding: Whether only a sampler takes the parameters. Matrices then have the form that is
        fast on their device, so that the sampler makes no copy; see `runtime.stored.as_stored`. On
        a CPU or TPU 4 bits become int8.

    Raises:
      CheckpointError: There is no checkpoint, or it cannot be served, or the adapters cannot; see
        `open_checkpoint`. Or it is stored in another scheme.
      ValueError: The sharding is unknown, does not fit the tree, or comes with a device or a mesh;
        the mesh does not fit the model; or parameters cannot be of the dtype, or JAX has it turned
        off; or the scheme is unknown, or does not fit a matrix, which the message names.
    """
    require_available(dtype)
    if sum((device is not None, sharding != "single_device", mesh is not None)) > 1:
        raise UserError(
            f"give either a device, a sharding or a mesh, got {device=} {sharding=} {mesh=}"
        )
    if device is not None:
        sharding = SingleDeviceSharding(device)
    if config is not None:
        overrides = overrides._replace(config=config)
    with open_checkpoint(path, overrides, adapter=adapter) as checkpoint:
        if mesh is not None:
            sharding = {}
            for path_, place in shardings_of(checkpoint.config, mesh).items():
                set_path(sharding, path_, place)
        params = _load(checkpoint, sharding, dtype, quantize, decoding)
    param_dtype = get_path(params, "embedder.input_embedding").dtype
    return Model(checkpoint.config, param_dtype=param_dtype, mesh=mesh), params


def save_checkpoint(
    path: str | os.PathLike[str],
    config: Config,
    params: Params,
    tokenizer: Any,
    *,
    force: bool = False,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Where the parameters are split over processes all must call this together; the first one writes.

    Args:
      path: The folder to make.
      config: What the model is.
      params: Its parameters.
      tokenizer: Its tokenizer: a `Tokenizer`, or what it takes, such as a path.
      force: Whether to replace what is at `path`.

    Raises:
      CheckpointError: `path` exists and `force` is not set, the disk has too little room, the
        parameters do not match the config (all that are wrong are named), or the tokenizer is
        of another size than the vocabulary.
    """
    leaves = flatten_nested_dict(params.get("params", params))
    held = {name: Held.of(leaf) for name, leaf in leaves.items()}
    dtypes = flax_layout(layer_spec(config)).dtypes(path, held)

    scheme = scheme_of(leaves.values())
    values = {spec.path: leaves[spec.path] for spec in layer_spec(config)}

    def write(arrays: Iterable[np.ndarray]) -> None:
        pieces = iter(arrays)

        def parameter(spec: ParamSpec) -> np.ndarray | Quantized:
            value = values[spec.path]
            if isinstance(value, Quantized):
                return value.with_parts(lambda _: next(pieces))
            return next(pieces)

        save_folder(path, config, dtypes, parameter, tokenizer, force=force, scheme=scheme)

    by_the_first(jax.tree.leaves(list(values.values())), write)


def load_parameters(
    checkpoint_path: str | os.PathLike[str],
    sharding: str | Sharding | Mapping[str, Any] = "single_device",
) -> Params:
    """The parameters in a checkpoint of any format, such as an Orbax directory from Kaggle.

    On the CPU these are views of its mapped file where they can be, as in `load_checkpoint`. The
    checkpoint need not say what its shapes do not tell.

    Args:
      checkpoint_path: The checkpoint, absolute or relative.
      sharding: "single_device", "replicated" (on every device), one sharding for all, or a tree of
        shardings like the parameters.

    Returns:
      The tree of parameters, without a `params` level.

    Raises:
      CheckpointError: There is no checkpoint, or it cannot be served; see `open_checkpoint`.
      ValueError: The sharding is unknown or does not fit the tree.
    """
    path = expanded(checkpoint_path).absolute()
    if not path.exists():
        raise UserError(f"no checkpoint directory at {path}")
    with open_headers(path) as checkpoint:
        return _load(checkpoint, sharding, None, None)


def _load(
    checkpoint: Reader,
    sharding: str | Sharding | Mapping[str, Any],
    dtype: Dtype | None,
    scheme: str | None,
    decoding: bool = False,
) -> dict[str, Any]:
    """Every parameter on its devices; on the host one at a time, and only what it keeps of it."""
    params: dict[str, Any] = {}
    for spec in checkpoint.specs:
        set_path(params, spec.path, None)
    shardings = _shardings(params, sharding)
    wanted = None if dtype is None else float_dtype(jnp.dtype(dtype))

    def part(spec: ParamSpec, value: np.ndarray) -> np.ndarray:
        place = get_path(shardings, spec.path)
        return value[local_slices(place, spec.shape)] if spreads(place) else value

    split = any(map(spreads, jax.tree.leaves(shardings)))
    # Without a choice, arrays go where other arguments are, like those that JAX makes.
    chosen = sharding != "single_device"
    for spec, value in checkpoint.read_as(wanted, scheme, part if split else None):
        place = get_path(shardings, spec.path)
        if spreads(place):
            held = put_part(value, place, spec.shape)
        else:
            held = jax.device_put(value, place if chosen else None)
            held = as_stored(spec, held, copies=False) if decoding else held
        set_path(params, spec.path, held)
    return params


def save_parameters(
    checkpoint_path: str | os.PathLike[str], params: Params, *, force: bool = False
) -> None:
    """Writes parameters as an Orbax directory, which `load_parameters` reads.

    Where the parameters are split over processes all must call this together, and see the disk.

    Raises:
      ValueError: The path exists and `force` is not set.
    """
    import orbax.checkpoint as ocp

    split = [leaf for leaf in jax.tree.leaves(params) if is_split(leaf)]
    processes = processes_of(split[0].sharding.mesh if split else None)
    with (
        processes.folder(expanded(checkpoint_path).absolute(), force=force) as folder,
        ocp.PyTreeCheckpointer() as checkpointer,
    ):
        checkpointer.save(folder / "it", dict(params))  # beside which Orbax writes, too
        if processes.is_first:
            for path in (folder / "it").iterdir():
                path.rename(folder / path.name)
            (folder / "it").rmdir()


def spreads(place: Sharding) -> bool:
    """Whether an array with this sharding lies on several devices."""
    return len(place.device_set) > 1


def _shardings(tree: Mapping[str, Any], sharding: str | Sharding | Mapping[str, Any]) -> Any:
    """One sharding a leaf."""
    leaves = jax.tree.map(lambda _: 0, tree, is_leaf=lambda leaf: leaf is None)
    if isinstance(sharding, Mapping):
        sharding = sharding.get("params", sharding)
        if jax.tree.structure(sharding) != jax.tree.structure(leaves):
            raise UserError("the tree of shardings must have the parameters' structure")
        return sharding
    if not isinstance(sharding, Sharding):
        devices = np.array(jax.devices())
        choices = {
            "single_device": SingleDeviceSharding(devices[0]),
            "replicated": NamedSharding(Mesh(devices, ("devices",)), PartitionSpec()),
        }
        if sharding not in choices:
            raise UserError(
                f'sharding must be "single_device", "replicated" or a tree, got {sharding!r}'
            )
        sharding = choices[sharding]
    return jax.tree.map(lambda _: sharding, leaves)
