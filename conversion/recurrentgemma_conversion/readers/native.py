"""`recurrentgemma`: the folders that both twins load directly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.checkpoint import CONFIG, metadata
from recurrentgemma.common.io.files import whole_folder
from recurrentgemma.common.io.shards import Shards, ShardsWriter
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.readers.base import (
    GIVE_CONFIG,
    Contents,
    Headers,
    Reader,
    Write,
    require_size,
    write_files,
)
from recurrentgemma_conversion.readers.kaggle_torch import StateDict, is_pickle


def open_tensors(path: Path, headers: Headers) -> Shards | StateDict:
    """The tensors of a folder, or of a file in it: safetensors, or else state dicts."""
    found = path.glob("*.safetensors") if path.is_dir() else []
    if any(found) or (path.is_file() and not is_pickle(path)):
        return headers.once(Shards, path)
    return headers.once(StateDict, path)


class SafetensorsReader(Reader):
    """A folder of `config.json` and weights, or one of these; tensors are views where possible."""

    def _open(self) -> None:
        self.shards = open_tensors(self.path, self._headers)
        self.tensors = {n: Tensor(t.shape, t.dtype) for n, t in self.shards.tensors.items()}
        self.homes = [self.path if self.path.is_dir() else self.path.parent]

    def fetch(self, name: str) -> np.ndarray:
        return self.shards.read(name)

    @property
    def weights(self) -> Sequence[Path]:
        return self.shards.paths


class NativeReader(SafetensorsReader):
    """A folder of ours, or a file of weights in it."""

    format = Format.RECURRENTGEMMA

    def _open(self) -> None:
        folder = self.path if self.path.is_dir() else self.path.parent
        if self._overrides.config is None and not (folder / CONFIG).is_file():
            raise DamagedError(f"the checkpoint folder {folder} lacks {CONFIG}{GIVE_CONFIG}")
        super()._open()

    def _stated(self) -> Config:
        return self._config_at(self.homes[0] / CONFIG)


@contextlib.contextmanager
def write_native(folder: Path, contents: Contents) -> Iterator[Write]:
    """Writes `config.json` and the weights."""
    config = contents.config
    tensors = layout(config, Format.RECURRENTGEMMA).tensors(contents.dtypes)
    with ShardsWriter(folder, tensors, metadata(config), contents.shard_size) as shards:
        yield shards.write
    (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")


def save_folder(
    path: str | os.PathLike[str],
    config: Config,
    dtypes: Mapping[str, np.dtype],
    parameter: Callable[[ParamSpec], np.ndarray],
    tokenizer: Any,
    *,
    force: bool = False,
) -> None:
    """Writes a folder of ours from a model in memory: whole, or not at all.

    Args:
      path: The folder to make.
      config: What the model is.
      dtypes: The dtype of each parameter, by path.
      parameter: Gives a parameter in the Flax layout; called once for each, in the order of the
        layer spec.
      tokenizer: A `Tokenizer`, or what it takes.
      force: Whether to replace what is at `path`.

    Raises:
      CheckpointError: `path` exists and `force` is not set, the disk has too little room, or the
        tokenizer is of another size than the vocabulary.
    """
    tokenizer = Tokenizer(tokenizer)
    require_size(tokenizer, config, "the tokenizer")
    files = tokenizer.files()
    stored = layout(config, Format.RECURRENTGEMMA)
    size = sum(spec.size * dtypes[spec.path].itemsize for spec in stored.specs)
    with whole_folder(path, force=force, size=size) as folder:
        with write_native(folder, Contents(config, dtypes)) as write:
            for name, tensor in stored.encode(parameter):
                write(name, tensor)
        write_files(folder, files)
