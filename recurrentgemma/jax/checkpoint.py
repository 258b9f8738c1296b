"""Loading and saving checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.flax
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from recurrentgemma.common.checkpoint import CONFIG, metadata, open_folder, write_folder
from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.layer_spec import layer_spec
from recurrentgemma.common.text import Tokenizer
from recurrentgemma.jax.griffin import Griffin, Params, get_path, set_path


def load_checkpoint(
    path: str | os.PathLike[str] | None = None, *, dtype: Dtype | None = None
) -> tuple[Griffin, Params]:
    """The model in a checkpoint folder, and its parameters.

    Args:
      path: The folder; the bundled model if None.
      dtype: Of the parameters and the computation; as stored if None.

    Raises:
      ValueError: The folder is no complete checkpoint; see `open_folder`.
    """
    folder = open_folder(path)
    stored = safetensors.flax.load_file(str(folder.weights))
    params: dict[str, Any] = {}
    for spec in layer_spec(folder.config):
        value = spec.torch.decode(stored[spec.torch.name], spec)
        set_path(params, spec.path, value if dtype is None else value.astype(dtype))
    param_dtype = jax.tree.leaves(params)[0].dtype
    return Griffin(folder.config, param_dtype=param_dtype), params


def save_checkpoint(
    path: str | os.PathLike[str],
    config: GriffinConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    force: bool = False,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Raises:
      ValueError: `path` exists and `force` is not set.
    """
    params = params.get("params", params)
    state = {
        spec.torch.name: jax.numpy.asarray(spec.torch.encode(get_path(params, spec.path)))
        for spec in layer_spec(config)
    }
    write_folder(
        path,
        config,
        lambda file: safetensors.flax.save_file(state, str(file), metadata(config)),
        tokenizer,
        force=force,
    )


def load_parameters(
    checkpoint_path: str | os.PathLike[str],
    sharding: str | Mapping[str, Any] = "single_device",
) -> Params:
    """The parameters in an Orbax directory (as on Kaggle) or in a checkpoint folder of ours.

    Args:
      checkpoint_path: The directory, absolute or relative.
      sharding: "single_device", "replicated" (on every device), or a tree of shardings like the
        parameters.

    Returns:
      The tree of parameters, without a `params` level.

    Raises:
      ValueError: There is no checkpoint, or the sharding is unknown or does not fit the tree.
    """
    path = Path(checkpoint_path).expanduser().absolute()
    if not path.is_dir():
        raise ValueError(f"no checkpoint directory at {path}")
    if (path / CONFIG).is_file():
        params = load_checkpoint(path)[1]
        return jax.tree.map(jax.device_put, params, _shardings(params, sharding))
    import orbax.checkpoint as ocp  # slow to import, and only this needs it

    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
        except (AttributeError, FileNotFoundError, ValueError) as error:
            raise ValueError(f"{path} is no Orbax checkpoint: {error}") from error
        wrapped = set(tree) == {"params"}
        shardings = _shardings(tree["params"] if wrapped else tree, sharding)
        restore_args = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=s), shardings)
        restore_args = {"params": restore_args} if wrapped else restore_args
        params = checkpointer.restore(path, restore_args=restore_args)
    return params["params"] if wrapped else params


def save_parameters(
    checkpoint_path: str | os.PathLike[str], params: Params, *, force: bool = False
) -> None:
    """Writes parameters as an Orbax directory, which `load_parameters` reads.

    Raises:
      ValueError: The path exists and `force` is not set.
    """
    import orbax.checkpoint as ocp

    path = Path(checkpoint_path).expanduser().absolute()
    if path.exists() and not force:
        raise ValueError(f"{path} exists; pass force=True to replace it")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, dict(params), force=force)


def _shardings(tree: Mapping[str, Any], sharding: str | Mapping[str, Any]) -> Any:
    """One sharding a leaf."""
    if not isinstance(sharding, str):
        sharding = sharding.get("params", sharding)
        if jax.tree.structure(sharding) != jax.tree.structure(jax.tree.map(lambda _: 0, tree)):
            raise ValueError("the tree of shardings must have the parameters' structure")
        return sharding
    devices = np.array(jax.devices())
    choices = {
        "single_device": SingleDeviceSharding(devices[0]),
        "replicated": NamedSharding(Mesh(devices, ("devices",)), PartitionSpec()),
    }
    if sharding not in choices:
        raise ValueError(
            f'sharding must be "single_device", "replicated" or a tree, got {sharding!r}'
        )
    return jax.tree.map(lambda _: choices[sharding], tree)
