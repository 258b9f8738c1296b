"""`recurrentgemma`: the folders that both twins load directly."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.arrays import Stacked
from recurrentgemma.common.io.checkpoint import CONFIG, TOKENIZER, metadata, read_config
from recurrentgemma.common.io.files import whole_folder
from recurrentgemma.common.io.shards import Shards, ShardsWriter
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.model.layouts import Stored
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import (
    Format,
    Reader,
    Request,
    Tensor,
    Writer,
    require_size,
    stored_tensors,
)
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides, resolve_config


def torch_layout(spec: ParamSpec) -> tuple[Stored, ...]:
    """A parameter as PyTorch has it."""
    return (spec.torch,)


class NativeReader(Reader):
    """A folder of ours, or a file of weights in it; its tensors are views of the mapped files."""

    format = Format.RECURRENTGEMMA
    layout = staticmethod(torch_layout)

    def __init__(self, path: Path, overrides: Overrides = NO_OVERRIDES) -> None:
        """Opens it.

        Raises:
          CheckpointError: It is damaged, or not what its config says.
        """
        folder = path if path.is_dir() else path.parent
        if not (folder / CONFIG).is_file():
            raise DamagedError(f"the checkpoint folder {folder} lacks {CONFIG}")
        self.shards = Shards(path)
        tensors = {n: Tensor(t.shape, t.dtype) for n, t in self.shards.tensors.items()}
        config = resolve_config(path, tensors, read_config(folder / CONFIG), overrides)
        super().__init__(path, config, tensors, [folder])

    def fetch(self, name: str) -> np.ndarray:
        return self.shards.read(name)

    @property
    def weights(self) -> Sequence[Path]:
        return self.shards.paths


class NativeWriter(Writer):
    """Writes `config.json` and the weights."""

    def __init__(self, folder: Path, request: Request) -> None:
        super().__init__(folder, request)
        layout = [(spec, torch_layout(spec)) for spec in layer_spec(request.config)]
        self._shards = ShardsWriter(
            folder, stored_tensors(request, layout), metadata(request.config), request.shard_size
        )

    def write(self, spec: ParamSpec, parameter: np.ndarray | Stacked) -> None:
        self._shards.write(spec.torch.name, spec.torch.encode(parameter))

    def abandon(self) -> None:
        self._shards.abandon()

    def finish(self) -> None:
        config = self.request.config
        (self.folder / CONFIG).write_text(config.to_json(), encoding="utf-8")


def save_folder(
    path: str | os.PathLike[str],
    config: GriffinConfig,
    dtypes: Mapping[str, np.dtype],
    parameter: Callable[[ParamSpec], np.ndarray],
    tokenizer: Tokenizer,
    *,
    force: bool = False,
) -> None:
    """Writes a folder of ours from a model in memory: whole, or not at all.

    Args:
      path: The folder to make.
      config: What the model is.
      dtypes: The dtype of each parameter, by path.
      parameter: Gives a parameter in the Flax layout; asked once for each, as the layer spec lists
        them.
      tokenizer: The tokenizer.
      force: Whether to replace what is at `path`.

    Raises:
      CheckpointError: `path` exists and `force` is not set, the disk has too little room, or the
        tokenizer is of another size than the vocabulary.
    """
    require_size(tokenizer, config, "the tokenizer")
    size = sum(spec.size * dtypes[spec.path].itemsize for spec in layer_spec(config))
    with whole_folder(path, force=force, size=size) as folder:
        writer = NativeWriter(folder, Request(config, dtypes, ""))
        try:
            for spec in layer_spec(config):
                writer.write(spec, parameter(spec))
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        (folder / TOKENIZER).write_bytes(tokenizer.vocab.serialized_model_proto())
