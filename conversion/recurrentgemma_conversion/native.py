"""`recurrentgemma`: the folders that both twins load directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recurrentgemma.common.checkpoint import CONFIG, metadata, open_folder
from recurrentgemma.common.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.layouts import Stored
from recurrentgemma.common.shards import ShardsWriter
from recurrentgemma_conversion.formats import (
    Format,
    Reader,
    Request,
    Tensor,
    Writer,
    stored_tensors,
)
from recurrentgemma_conversion.overrides import Overrides, resolve_config


def torch_layout(spec: ParamSpec) -> tuple[Stored, ...]:
    """A parameter as PyTorch has it."""
    return (spec.torch,)


class NativeReader(Reader):
    """A folder of ours; its tensors are views of the mapped files."""

    format = Format.RECURRENTGEMMA
    layout = staticmethod(torch_layout)

    def __init__(self, path: Path, overrides: Overrides) -> None:
        """Opens it; see `open_folder` for what can be wrong."""
        folder = open_folder(path)
        self.shards = folder.shards
        tensors = {n: Tensor(t.shape, t.dtype) for n, t in folder.shards.tensors.items()}
        config = resolve_config(path, tensors, folder.config, overrides)
        super().__init__(path, config, tensors, [path])

    def fetch(self, name: str) -> np.ndarray:
        return self.shards.read(name)


class NativeWriter(Writer):
    """Writes `config.json` and the weights."""

    def __init__(self, folder: Path, request: Request) -> None:
        super().__init__(folder, request)
        layout = [(spec, torch_layout(spec)) for spec in layer_spec(request.config)]
        self._shards = ShardsWriter(
            folder, stored_tensors(request, layout), metadata(request.config), request.shard_size
        )

    def write(self, spec: ParamSpec, parameter: np.ndarray) -> None:
        self._shards.write(spec.torch.name, spec.torch.encode(parameter))

    def finish(self) -> None:
        config = self.request.config
        (self.folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
