"""The four formats, and what a reader and a writer of any of them is."""

from __future__ import annotations

import abc
import enum
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import (
    MismatchError,
    NotRecurrentGemmaError,
    PathError,
    TokenizerError,
)
from recurrentgemma.common.io.arrays import DTYPES, Stacked, cast, dtype_name
from recurrentgemma.common.io.checkpoint import TOKENIZER, no_tokenizer
from recurrentgemma.common.io.shards import SHARD_SIZE
from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec, mismatches
from recurrentgemma.common.model.layouts import Stored
from recurrentgemma.common.model.presets import Preset
from recurrentgemma.common.tokenizer import Tokenizer

# What tensors of the Gemma family are called, none of which occurs in RecurrentGemma.
_GEMMA = ("self_attn.", "qkv_proj", "attn_vec_einsum", "qkv_einsum", "q_einsum", "layer_0.")


class Format(enum.StrEnum):
    """A published checkpoint format."""

    KAGGLE_FLAX = "kaggle-flax"
    KAGGLE_TORCH = "kaggle-torch"
    HUGGINGFACE = "huggingface"
    RECURRENTGEMMA = "recurrentgemma"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"a format must be one of {', '.join(cls)}, got {value!r}")


class Tensor(NamedTuple):
    """Shape and dtype of a stored tensor; a dtype that is no float is None."""

    shape: tuple[int, ...]
    dtype: np.dtype | None

    @classmethod
    def of(cls, array: Any) -> Tensor:
        """Those of an array of either framework or NumPy."""
        return cls(tuple(np.shape(array)), DTYPES.get(dtype_name(getattr(array, "dtype", None))))


class Reader(abc.ABC):
    """An opened checkpoint: what it is, known from its headers, and its parameters one at a time.

    Making one reads no weights. It checks that the tensors are those of the config.

    Attributes:
      format: Which of the formats it is.
      path: The file or folder with the weights.
      config: What the model is.
      tokenizer: The sentencepiece model beside the weights, if there is one.
      companions: Other files that belong to the checkpoint in its own format.
      special_ids: The special tokens' ids as its config has them, by their names there.
      tensors: The stored tensors, by name.
      named: What the user knows a path in it by: in an archive, the archive's.
    """

    format: Format
    named: Callable[[Path], str] = staticmethod(str)

    def __init__(
        self,
        path: Path,
        config: GriffinConfig,
        tensors: Mapping[str, Tensor],
        homes: Sequence[Path],
    ) -> None:
        """Checks the tensors; `homes` are the folders where a tokenizer would be."""
        self.path, self.config, self.tensors = path, config, tensors
        found = (home / TOKENIZER for home in homes)
        self.tokenizer = next((file for file in found if file.is_file()), None)
        self.companions: Sequence[Path] = ()
        self.special_ids: Mapping[str, Any] = {}
        self.dtypes = require_tensors(path, config, tensors, self.layout)

    @staticmethod
    @abc.abstractmethod
    def layout(spec: ParamSpec) -> tuple[Stored, ...]:
        """How the format stores a parameter."""

    @abc.abstractmethod
    def fetch(self, name: str) -> np.ndarray:
        """A stored tensor: where the format allows, a view of the mapped file."""

    def read(self, spec: ParamSpec) -> np.ndarray:
        """A parameter in the Flax layout, as stored otherwise."""
        return np.asarray(self.read_parts(spec))

    def read_parts(self, spec: ParamSpec) -> np.ndarray | Stacked:
        """`read`, not put together where it is stored in parts."""
        stored = self.layout(spec)
        parts = [part.decode(self.fetch(part.name), spec) for part in stored]
        return parts[0] if stored[0].part is None else Stacked(parts)

    @property
    def stored_bytes(self) -> int:
        """The size of the files of the weights."""
        files = [self.path] if self.path.is_file() else self.weights
        return sum(file.stat().st_size for file in files)

    @property
    def weights(self) -> Sequence[Path]:
        """The files of the weights."""
        return [file for file in self.path.rglob("*") if file.is_file()]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          TokenizerError: There is none beside the weights, or it is damaged.
        """
        if self.tokenizer is None:
            raise no_tokenizer(self.path)
        try:
            return Tokenizer(self.tokenizer)
        except ValueError as error:
            raise TokenizerError(str(error)) from error

    def __iter__(self) -> Iterator[tuple[ParamSpec, np.ndarray]]:
        """Every parameter, in the order of the layer spec."""
        for spec in layer_spec(self.config):
            yield spec, self.read(spec)

    def read_as(self, dtype: np.dtype | None) -> Iterator[tuple[ParamSpec, np.ndarray]]:
        """Every parameter, in the order of the layer spec, as a model computes with it.

        Args:
          dtype: Of all; as stored if None, but where what matrix products take is stored in several
            it is float32, or float64 beside float64.
        """
        dtypes = {s.path: dtype or self.dtypes[s.path] for s in layer_spec(self.config)}
        factors = [s.path for s in layer_spec(self.config) if not s.wide]
        found = {dtypes[path] for path in factors}
        if len(found) > 1:
            widest = max(DTYPES["float32"], *found, key=lambda dtype: dtype.itemsize)
            dtypes |= dict.fromkeys(factors, widest)
        for spec, value in self:
            yield spec, cast(value, dtypes[spec.path])


class Request(NamedTuple):
    """What to write.

    Attributes:
      config: What the model is.
      dtypes: The dtype of each parameter, by path.
      name: What the weights are called, where a format gives them a name ("2b-it").
      shard_size: Bytes in a safetensors file, at most.
      tokenizer: The tokenizer, where a format has files of its own for it.
      ocdbt: Whether an Orbax directory is to be a database, not a file for each array.
      special_ids: The special tokens' ids, where a config has them; those not given are the
        tokenizer's, or else as in the published vocabulary.
    """

    config: GriffinConfig
    dtypes: Mapping[str, np.dtype]
    name: str
    shard_size: int = SHARD_SIZE
    tokenizer: Tokenizer | None = None
    ocdbt: bool = False
    special_ids: Mapping[str, Any] = MappingProxyType({})


class Writer(abc.ABC):
    """Writes a checkpoint into an empty folder, one parameter at a time in the spec's order."""

    def __init__(self, folder: Path, request: Request) -> None:
        self.folder, self.request = folder, request

    @abc.abstractmethod
    def write(self, spec: ParamSpec, parameter: np.ndarray | Stacked) -> None:
        """Writes a parameter, given in the Flax layout, cast to the requested dtype."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Writes what comes after the weights, and closes its files."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """Closes its files, the writing having failed."""


def stored_tensors(
    request: Request, layout: Sequence[tuple[ParamSpec, Sequence[Stored]]]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each tensor to be stored, by name, in the order of writing."""
    return {
        part.name: (part.shape, request.dtypes[spec.path])
        for spec, parts in layout
        for part in parts
    }


def checkpoint_name(config: GriffinConfig) -> str:
    """What Kaggle calls the weights of a published size."""
    fields = config.to_dict()
    for preset, name in (
        (Preset.RECURRENT_GEMMA_2B_V1, "2b"),
        (Preset.RECURRENT_GEMMA_9B_V1, "9b"),
    ):
        known = GriffinConfig.from_preset(preset, config.vocab_size).to_dict()
        if all(fields[field] == known[field] for field in ("width", "lru_width", "block_types")):
            return name
    return "model"


def require_tensors(
    path: str | os.PathLike[str], config: GriffinConfig, tensors: Mapping[str, Tensor], layout
) -> dict[str, np.dtype]:
    """The dtype of each parameter, by path.

    Args:
      path: Where the tensors are, or go.
      config: What the model is.
      tensors: They, by name.
      layout: How they store a parameter.

    Raises:
      MismatchError: They are not those of the config; it lists all differences.
    """
    expected = {part.name: part.shape for spec in layer_spec(config) for part in layout(spec)}
    problems = mismatches(expected, {name: tensor.shape for name, tensor in tensors.items()})
    supported = ", ".join(DTYPES)
    problems += [
        f"{name} must be of a dtype among {supported}"
        for name, tensor in tensors.items()
        if name in expected and dtype_name(tensor.dtype) not in DTYPES
    ]
    problems += [
        f"{spec.path} must have one dtype in all its parts"
        for spec in layer_spec(config)
        if len({t.dtype for part in layout(spec) if (t := tensors.get(part.name))}) > 1
    ]
    if problems:
        raise MismatchError(f"{path}: the tensors are not those of the config", problems)
    return {
        spec.path: dtype
        for spec in layer_spec(config)
        if (dtype := tensors[layout(spec)[0].name].dtype) is not None
    }


def require_size(tokenizer: Tokenizer, config: GriffinConfig, name: object) -> None:
    """Raises `TokenizerError`, with the tokenizer's name, if it has not the vocabulary's size."""
    if tokenizer.size != config.vocab_size:
        raise TokenizerError(
            f"{name} has {tokenizer.size} pieces, and the vocabulary {config.vocab_size} entries"
        )


def require_utf8(path: Path, library: str) -> str:
    """The path as text, for a library that opens no other; `PathError` if it is none."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise PathError(
            f"{path}: {library} opens only names that are UTF-8: rename what is not"
        ) from error
    return str(path)


def require_recurrent(path: Path, names: Sequence[str]) -> None:
    """Raises `NotRecurrentGemmaError` for the tensors of another model of the family."""
    dotted = [name.replace("/", ".") for name in names]
    telling = next((name for name in dotted if any(mark in name for mark in _GEMMA)), None)
    if telling is not None:
        raise NotRecurrentGemmaError(
            f"{path} is a Gemma checkpoint, a transformer: it has {telling!r}; RecurrentGemma's "
            "recurrent blocks are needed"
        )
