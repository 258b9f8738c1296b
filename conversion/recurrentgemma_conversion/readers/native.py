"""`recurrentgemma`: the folders that both twins load directly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.arrays import DTYPES, Stacked, cast
from recurrentgemma.common.io.checkpoint import (
    CONFIG,
    Quantization,
    config_text,
    metadata,
    quantization_of,
)
from recurrentgemma.common.io.files import whole_folder
from recurrentgemma.common.io.shards import Shards, ShardsWriter
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec, mismatches
from recurrentgemma.common.model.state_dict import to_torch, torch_name, torch_shape
from recurrentgemma.common.quantization import (
    Quantized,
    dequantize,
    input_axis,
    quantize_parameter,
    scheme_for,
    spec_parts,
    stored_bytes,
)
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.readers.base import (
    GIVE_CONFIG,
    Contents,
    Headers,
    Reader,
    Write,
    common_dtype,
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
    """A folder of ours, or a file of weights in it.

    A quantised matrix counts as one tensor, in the dtype that it was quantised from.
    """

    format = Format.RECURRENTGEMMA

    def _open(self) -> None:
        folder = self.path if self.path.is_dir() else self.path.parent
        stated = (folder / CONFIG).is_file()
        if self._overrides.config is None and not stated:
            raise DamagedError(f"the checkpoint folder {folder} lacks {CONFIG}{GIVE_CONFIG}")
        super()._open()
        self._quantized: dict[str, ParamSpec] = {}
        self._damaged: list[str] = []
        config = folder / CONFIG
        self._quantization = quantization_of(self._fields_at(config), config) if stated else None
        if self._quantization is not None:
            self.scheme = self._quantization.scheme
            self._fold(self._quantization)

    def _stated(self) -> Config:
        return self._config_at(self.homes[0] / CONFIG)

    def _problems(self) -> Sequence[str]:
        return self._damaged

    def _fold(self, quantization: Quantization) -> None:
        """Puts one tensor in the place of the parts of each quantised matrix."""
        for spec in layer_spec(self.stated):
            if scheme_for(spec, quantization.scheme) is None:
                continue
            name, parts = torch_name(spec.path), spec_parts(spec, quantization.scheme)
            given = {name + part: self.tensors.pop(name + part, None) for part in parts}
            stored = {n: self.shards.tensors[n] for n, tensor in given.items() if tensor}
            wanted = {name + part: shape for part, (shape, _) in parts.items()}
            wrong = mismatches(wanted, {n: info.shape for n, info in stored.items()})
            wrong += [
                f"{name}{part} must be {dtype}, got {stored[name + part].dtype}"
                for part, (_, dtype) in parts.items()
                if name + part in stored and stored[name + part].dtype != dtype
            ]
            self._damaged += wrong
            shape, dtype = torch_shape(spec.path, spec.shape), DTYPES[quantization.dtype]
            self.tensors[name] = Tensor(shape, dtype)
            self._quantized[name] = spec

    def fetch(self, name: str) -> np.ndarray:
        """A stored tensor; a quantised matrix is dequantised."""
        if name not in self._quantized:
            return super().fetch(name)
        spec = self._quantized[name]
        held: Any = self.read_stored(spec)
        return cast(to_torch(spec.path, dequantize(held)), DTYPES[held.dtype])

    def read_stored(
        self, spec: ParamSpec, scheme: str | None = None
    ) -> np.ndarray | Stacked | Quantized:
        """A parameter as it is stored, without adapters."""
        if torch_name(spec.path) not in self._quantized:
            return super().read_stored(spec)
        assert self._quantization is not None
        name, scheme = torch_name(spec.path), self.stored_in(spec)
        assert scheme is not None
        parts = {part: self.shards.read(name + part) for part in spec_parts(spec, scheme)}
        arrays = parts[""], parts[".scale"], parts.get(".zero")
        return Quantized(*arrays, scheme, input_axis(spec), self._quantization.dtype)


@contextlib.contextmanager
def write_native(folder: Path, contents: Contents) -> Iterator[Write]:
    """Writes `config.json` and the weights."""
    config, quantization = contents.config, None
    if contents.scheme is not None:
        held = [spec.path for spec in layer_spec(config) if scheme_for(spec, contents.scheme)]
        dtype = common_dtype(contents.dtypes[path] for path in held)
        quantization = Quantization(contents.scheme, dtype.name)
    tensors = layout(config, Format.RECURRENTGEMMA).tensors(contents.dtypes, contents.scheme)
    said = metadata(config, quantization)
    with ShardsWriter(folder, tensors, said, contents.shard_size) as shards:
        yield shards.write
    (folder / CONFIG).write_text(config_text(config, quantization), encoding="utf-8")


def save_folder(
    path: str | os.PathLike[str],
    config: Config,
    dtypes: Mapping[str, np.dtype],
    parameter: Callable[[ParamSpec], np.ndarray | Quantized],
    tokenizer: Any,
    *,
    force: bool = False,
    scheme: str | None = None,
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
      scheme: The scheme in which matrices are stored; those that are not `Quantized` yet become so.

    Raises:
      CheckpointError: `path` exists and `force` is not set, the disk has too little room, or the
        tokenizer is of another size than the vocabulary.
    """
    tokenizer = Tokenizer(tokenizer)
    require_size(tokenizer, config, "the tokenizer")
    files = tokenizer.files()
    stored = layout(config, Format.RECURRENTGEMMA)
    sizes = (stored_bytes(s, dtypes[s.path].itemsize, scheme) for s in stored.specs)
    with whole_folder(path, force=force, size=sum(sizes)) as folder:
        with write_native(folder, Contents(config, dtypes, scheme=scheme)) as write:
            for name, tensor in stored.encode(
                lambda spec: quantize_parameter(spec, parameter(spec), scheme)
            ):
                write(name, tensor)
        write_files(folder, files)
