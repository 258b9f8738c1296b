"""Adapters on disk: a safetensors file that both twins read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recurrentgemma.common.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    NonFiniteError,
    UnknownFormatError,
)
from recurrentgemma.common.io.arrays import DTYPES, count_nonfinite, dtype_name
from recurrentgemma.common.io.files import expanded, whole_file
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma.common.model.config import Config, config_from_dict
from recurrentgemma.common.model.layer_spec import mismatches
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs

ADAPTERS = "adapters.safetensors"
_FORMAT, _VERSION = "recurrentgemma-adapters", "1"


class Adapters(NamedTuple):
    """Trained adapters.

    Attributes:
      config: The model that they belong to.
      options: Their targets and sizes.
      arrays: A and B of each target, by the paths of `adapter_specs`.
    """

    config: Config
    options: LoraOptions
    arrays: Mapping[str, np.ndarray]


def write_adapters(
    path: str | os.PathLike[str], adapters: Adapters, *, force: bool = False
) -> None:
    """Writes an adapter file: whole, or not at all.

    Raises:
      DestinationError: `path` exists and `force` is not set, or cannot be written.
    """
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(adapters.config.to_dict()),
        "lora": json.dumps(dataclasses.asdict(adapters.options)),
    }
    with whole_file(path, force=force) as temporary:
        write_tensors(temporary, adapters.arrays, metadata)


def read_adapters(path: str | os.PathLike[str], config: Config | None = None) -> Adapters:
    """Reads an adapter file, or the one in a folder.

    Args:
      path: The file, or a folder with `adapters.safetensors`.
      config: The model that they must belong to; any if None.

    Raises:
      CheckpointError: It is no adapter file, not whole, holds NaN or infinity, or its adapters
        belong to another model (every difference is named).
    """
    path = expanded(path)
    path = path / ADAPTERS if path.is_dir() else path
    if not path.is_file():
        raise UnknownFormatError(f"no adapters at {path}")
    file = TensorFile(path)
    if file.metadata.get("format") != _FORMAT:
        raise UnknownFormatError(f"{path} holds no adapters of ours: its header does not say so")
    if file.metadata.get("version") != _VERSION:
        version = file.metadata.get("version")
        raise UnknownFormatError(f"{path} is of version {version}, {_VERSION} is expected")
    try:
        stored = config_from_dict(json.loads(file.metadata["config"]))
        fields = json.loads(file.metadata["lora"])
        options = LoraOptions(**{**fields, "targets": tuple(fields["targets"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path}: its header is damaged: {error!r}") from error
    if config is not None:
        _require_same_model(path, stored, config)
    specs = trainable_specs(stored, options)
    problems = mismatches(
        {spec.path: spec.shape for spec in specs},
        {name: info.shape for name, info in file.tensors.items()},
    )
    problems += [
        f"{name} must be floating-point"
        for name, tensor in file.tensors.items()
        if dtype_name(tensor.dtype) not in DTYPES
    ]
    if problems:
        raise MismatchError(f"{path}: the adapters do not match its header", problems)
    arrays = {spec.path: file.read(spec.path) for spec in specs}
    require_finite(path, arrays)
    return Adapters(stored, options, arrays)


def require_finite(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `NonFiniteError`, which names the arrays, if any holds NaN or infinity."""
    bad = [name for name, array in arrays.items() if count_nonfinite(array)]
    if bad:
        raise NonFiniteError(f"{path} holds NaN or infinity in {', '.join(bad)}")


def _require_same_model(path: Path, stored: Config, config: Config) -> None:
    differences = [
        f"{name} is {its!r}, the model has {own!r}"
        for name, (its, own) in stored.differences(config).items()
    ]
    if differences:
        raise ConfigError(f"{path}: adapters of another model: {'; '.join(differences)}")
