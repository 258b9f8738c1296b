"""Adapters on disk: a safetensors file that both twins read, and the folder that PEFT reads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
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
from recurrentgemma.common.io.files import expanded, whole_file, whole_folder
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import mismatches
from recurrentgemma.common.training.lora import (
    LoraOptions,
    adapter_specs,
    lora_targets,
    trainable_specs,
)

ADAPTERS = "adapters.safetensors"
_FORMAT, _VERSION = "recurrentgemma-adapters", "1"


class Adapters(NamedTuple):
    """Trained adapters.

    Attributes:
      config: The model that they are of.
      options: What they were made of.
      arrays: A and B of each target, by the paths of `adapter_specs`.
    """

    config: GriffinConfig
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


def read_adapters(path: str | os.PathLike[str], config: GriffinConfig | None = None) -> Adapters:
    """Reads an adapter file, or that of a folder.

    Args:
      path: The file, or a folder with `adapters.safetensors`.
      config: The model that they must be of; any if None.

    Raises:
      CheckpointError: It is no adapter file, not whole, holds NaN or infinity, or its adapters are
        not of this model (every difference is named).
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
        stored = GriffinConfig.from_dict(json.loads(file.metadata["config"]))
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
        raise MismatchError(f"{path}: the adapters are not those of its header", problems)
    arrays = {spec.path: file.read(spec.path) for spec in specs}
    bad = [name for name, array in arrays.items() if count_nonfinite(array)]
    if bad:
        raise NonFiniteError(f"{path} holds NaN or infinity in {', '.join(bad)}")
    return Adapters(stored, options, arrays)


def write_peft(path: str | os.PathLike[str], adapters: Adapters, *, force: bool = False) -> None:
    """Writes a folder that PEFT loads on `transformers`' RecurrentGemma.

    Raises:
      UnknownFormatError: There are adapters of gates, which are no linear layers there.
      CheckpointError: `path` exists and `force` is not set, or the disk has too little room.
    """
    tensors = dict(_peft_tensors(adapters))
    modules = {name.split(".")[-3] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapters.options.rank,
        "lora_alpha": adapters.options.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with whole_folder(path, force=force, size=size) as folder:
        text = json.dumps(config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _peft_tensors(adapters: Adapters) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and arrays: A as [rank, I], B as [J, rank], of each linear layer."""
    for target in lora_targets(adapters.config, adapters.options):
        pair = adapter_specs(target, adapters.options.rank)
        for part in target.hf:
            if not part.name.endswith(".weight"):
                raise UnknownFormatError(
                    f"PEFT's layout has no adapters of {part.name}, which is no linear layer; "
                    "train without the target gates"
                )
            for spec, name in zip(pair, ("lora_A", "lora_B"), strict=True):
                matrix = adapters.arrays[spec.path]
                matrix = matrix if part.part is None else matrix[part.part]
                module = part.name.removesuffix(".weight")
                yield f"base_model.model.{module}.{name}.weight", matrix.swapaxes(-1, -2)


def _require_same_model(path: Path, stored: GriffinConfig, config: GriffinConfig) -> None:
    expected = config.to_dict()
    differences = [
        f"{name} is {value!r}, the model has {expected[name]!r}"
        for name, value in stored.to_dict().items()
        if name != "scan_type" and value != expected[name]
    ]
    if differences:
        raise ConfigError(f"{path}: adapters of another model: {'; '.join(differences)}")
