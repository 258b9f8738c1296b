"""Checkpoint folders as both twins read and write them: which files, which names, which errors.

A folder holds `config.json`, `model.safetensors` (or shards with an index; tensors under their
PyTorch names and axis orders, as the layer spec gives them) and `tokenizer.model`, which only those
who ask for it need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    TokenizerError,
    UnknownFormatError,
)
from recurrentgemma.common.files import expanded, whole_folder
from recurrentgemma.common.layer_spec import layer_spec, mismatches
from recurrentgemma.common.shards import INDEX, WEIGHTS, Shards
from recurrentgemma.common.tensor_files import DTYPE_NAMES
from recurrentgemma.common.text import Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "tiny"


class CheckpointFolder(NamedTuple):
    """A folder that has been checked, its weights not yet read.

    Attributes:
      path: The folder.
      config: What the model is.
      shapes: Shape of each tensor by its stored name.
      dtypes: safetensors' name of each tensor's dtype ("BF16", "F32", ...).
      shards: The files of the weights.
    """

    path: Path
    config: GriffinConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    shards: Shards

    @property
    def weights(self) -> Path:
        """The file of the weights; the first of several."""
        return next(iter(self.shards.files.values())).path

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read now; `TokenizerError` where there is none."""
        if not (self.path / TOKENIZER).is_file():
            raise no_tokenizer(self.path)
        return Tokenizer(self.path / TOKENIZER)


def open_folder(path: str | os.PathLike[str] | None = None) -> CheckpointFolder:
    """Checks a checkpoint folder, reading its config and the headers of its weights.

    Args:
      path: The folder, or a file of weights in it; the bundled model if None.

    Raises:
      CheckpointError: Files are missing (all are named), unreadable, or the weights' names and
        shapes are not the config's (every difference is named).
    """
    weights = BUNDLED if path is None else expanded(path)
    folder = weights.parent if weights.is_file() else weights
    if not folder.is_dir():
        raise UnknownFormatError(f"no checkpoint folder at {folder}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if (weights.is_file() or (folder / INDEX).is_file()) and WEIGHTS in missing:
        missing.remove(WEIGHTS)
    if missing:
        raise DamagedError(f"the checkpoint folder {folder} lacks {', '.join(missing)}")
    config = read_config(folder / CONFIG)
    shards = Shards(weights)
    shapes = {name: info.shape for name, info in shards.tensors.items()}
    dtypes = {
        name: "no float" if info.dtype is None else DTYPE_NAMES[info.dtype]
        for name, info in shards.tensors.items()
    }
    expected = {spec.torch.name: spec.torch.shape for spec in layer_spec(config)}
    problems = mismatches(expected, shapes)
    problems += [
        f"{name} must be of a floating-point dtype"
        for name, info in shards.tensors.items()
        if info.dtype is None and name in expected
    ]
    if problems:
        raise MismatchError(f"{folder}: the parameters do not match the config", problems)
    return CheckpointFolder(folder, config, shapes, dtypes, shards)


def read_config(path: Path) -> GriffinConfig:
    """The configuration in a file of ours; `ConfigError` when it holds none."""
    try:
        return GriffinConfig.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer in a checkpoint folder, or in a sentencepiece model file.

    Args:
      path: The folder or file; the bundled model's if None.

    Raises:
      ValueError: There is none.
    """
    found = BUNDLED if path is None else expanded(path)
    return Tokenizer(found / TOKENIZER if found.is_dir() else found)


def no_tokenizer(path: Path) -> TokenizerError:
    """The error that a checkpoint has no tokenizer, with what to do."""
    return TokenizerError(
        f"there is no {TOKENIZER} beside the weights in {path}: put the model's there, or write a "
        "checkpoint with it by recurrentgemma convert --tokenizer"
    )


def write_folder(
    path: str | os.PathLike[str],
    config: GriffinConfig,
    save_weights: Callable[[Path], None],
    tokenizer: Tokenizer,
    *,
    force: bool = False,
    size: int = 0,
) -> None:
    """Writes a checkpoint folder: whole, or not at all.

    Args:
      path: The folder to make.
      config: What the model is.
      save_weights: Writes the weights to the file it is given.
      tokenizer: The tokenizer.
      force: Whether to replace what is at `path`.
      size: Bytes of the weights, for which there must be room; not checked if 0.

    Raises:
      CheckpointError: `path` exists and `force` is not set, or the disk has too little room.
    """
    with whole_folder(path, force=force, size=size) as folder:
        save_weights(folder / WEIGHTS)
        (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
        (folder / TOKENIZER).write_bytes(tokenizer.vocab.serialized_model_proto())


def metadata(config: GriffinConfig) -> dict[str, str]:
    """What a weights file says of itself."""
    return {"format": "pt", "config": json.dumps(config.to_dict())}
