"""What every format's reader and writer have in common."""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from recurrentgemma.common.errors import ConfigError, TokenizerError, UserError
from recurrentgemma.common.io.arrays import DTYPES, Stacked, cast
from recurrentgemma.common.io.checkpoint import CONFIG, config_of, no_tokenizer
from recurrentgemma.common.io.shards import SHARD_SIZE
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.quantization import (
    Quantized,
    input_axis,
    quantize_parameter,
    scheme_for,
)
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.training.adapters import Adapters
from recurrentgemma.common.training.lora import merge
from recurrentgemma.common.vocabulary import TOKENIZER_FILES
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names import family_named, family_of, layout, other_parts
from recurrentgemma_conversion.names.family import Family
from recurrentgemma_conversion.names.others import require_no_other
from recurrentgemma_conversion.names.table import Layout
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides

T = TypeVar("T")

GIVE_CONFIG = ": put it there, or give load_checkpoint a config"


class Headers:
    """What was parsed of a checkpoint's files: of each the config or the headers, once."""

    def __init__(self) -> None:
        self._parsed: dict[tuple[Callable[[Path], Any], Path], Any] = {}

    def once(self, parse: Callable[[Path], T], path: Path) -> T:
        """What `parse` makes of a file; the same object every time."""
        if (parse, path) not in self._parsed:
            self._parsed[parse, path] = parse(path)
        return self._parsed[parse, path]


class Reader(abc.ABC):
    """An opened checkpoint: what it is, known from its headers, and its parameters one at a time.

    Making one parses the headers, once, and reads no weights. The config is resolved and compared
    with the tensors when it is first asked for; `require` asks.

    Attributes:
      format: Its format.
      path: The file or folder with the weights.
      tensors: The stored tensors of the model, by name.
      left_out: The tensors of other parts, such as a vision encoder.
      homes: The folders where a tokenizer would be, the nearest first.
      companions: Other files that belong to the checkpoint in its own format.
      special_ids: The special tokens' ids in its config, by their names there.
      named: What the user calls a path in it: in an archive, the archive's name.
      adapters: Adapters that are added to the parameters as they are read, if any.
      scheme: The scheme in which its matrices are stored, if they are quantised.
    """

    format: Format
    tensors: dict[str, Tensor]
    homes: Sequence[Path]
    companions: Sequence[Path] = ()
    special_ids: Mapping[str, Any] = MappingProxyType({})
    named: Callable[[Path], str] = staticmethod(str)
    adapters: Adapters | None = None
    scheme: str | None = None

    def __init__(
        self, path: Path, overrides: Overrides = NO_OVERRIDES, headers: Headers | None = None
    ) -> None:
        self.path, self._overrides, self._headers = path, overrides, headers or Headers()
        self._open()
        require_no_other(path, self.tensors)
        self.left_out, buffers = other_parts(self.tensors)
        for name in (*self.left_out, *buffers):
            self.tensors.pop(name, None)

    @abc.abstractmethod
    def _open(self) -> None:
        """Parses the headers: sets `tensors` and `homes`."""

    @functools.cached_property
    def stated(self) -> Any:
        """The config that the caller or the checkpoint states, None if neither states one.

        Raises:
          ConfigError: There is a `config.json` that cannot be read.
        """
        return self._overrides.config or self._stated()

    def _stated(self) -> Any:
        """The config that the checkpoint states, or None: here ours, beside the weights."""
        for path in (folder / CONFIG for folder in around(self.path)):
            if path.is_file() and "model_type" not in self._fields_at(path):  # Hugging Face's
                return self._config_at(path)
        return None

    def _fields_at(self, path: Path) -> dict[str, Any]:
        return self._headers.once(read_fields, path)

    def _config_at(self, path: Path) -> Config:
        """The config in a file of ours."""
        return config_of(self._fields_at(path), path)

    @abc.abstractmethod
    def fetch(self, name: str) -> np.ndarray:
        """A stored tensor: where the format allows, a view of the mapped file."""

    def _problems(self) -> Sequence[str]:
        """Problems with the tensors other than names, shapes and dtypes."""
        return ()

    @functools.cached_property
    def config(self) -> Config:
        """What the model is.

        Raises:
          ConfigError: It cannot be told, or what was asked for contradicts it.
        """
        if self.family is not None:
            return self._told(self.family.resolve, self.tensors, self.stated, self._overrides)
        if self._overrides._replace(config=None) != NO_OVERRIDES:
            raise ConfigError(f"{self.path} states its whole config: nothing overrides it")
        return self.stated

    @functools.cached_property
    def family(self) -> Family | None:
        """The model's family; None where no format but ours has names for its parameters."""
        return family_of(self.stated) if self.stated else family_named(self.tensors)

    @functools.cached_property
    def layout(self) -> Layout:
        """How the parameters are stored; they do not depend on what only `config` knows."""
        config = self.stated
        if config is None:
            assert self.family is not None  # the names tell one
            config = self._told(self.family.sized, self.tensors)
        self._told(layer_spec, config)  # sizes of which no model can be made
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return layout(config, self.format, shapes)

    def _told(self, tell: Callable[..., Any], *args: Any) -> Any:
        try:
            return tell(*args)
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each parameter unless another is asked for, by path: the stored one.

        Raises:
          MismatchError: The tensors do not match the config; all differences are listed.
        """
        return self.layout.dtypes(self.path, self.tensors, self._problems())

    @property
    def specs(self) -> Sequence[ParamSpec]:
        """The parameters, in the order of the layer spec."""
        return self.layout.specs

    def require(self) -> None:
        """Raises `CheckpointError` unless the config is known and the tensors match it."""
        _ = self.config, self.dtypes

    def read(self, spec: ParamSpec) -> np.ndarray:
        """A parameter in the Flax layout, with all bits stored; float32 or wider if adapted."""
        return np.asarray(self.read_parts(spec))

    def read_parts(self, spec: ParamSpec) -> np.ndarray | Stacked:
        """`read`, not put together where it is stored in parts."""
        value = self.layout.decode(spec, self.fetch)
        if self.adapters is None:
            return value
        return merge(spec, np.asarray(value), self.adapters.arrays, self.adapters.options)

    @property
    def stored_bytes(self) -> int:
        """The size of the files of the weights."""
        files = [self.path] if self.path.is_file() else self.weights
        return sum(file.stat().st_size for file in files)

    @property
    def weights(self) -> Sequence[Path]:
        """The files of the weights."""
        return [file for file in self.path.rglob("*") if file.is_file()]

    @property
    def tokenizer(self) -> Path | None:
        """The file with the tokenizer, if there is one: beside the weights."""
        found = (home / name for home in self.homes for name in TOKENIZER_FILES)
        return next((file for file in found if file.is_file()), None)

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
        _ = self.dtypes
        for spec in self.specs:
            yield spec, self.read(spec)

    def read_as(
        self,
        dtype: np.dtype | None,
        scheme: str | None,
        part: Callable[[ParamSpec, np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[tuple[ParamSpec, np.ndarray | Quantized]]:
        """Every parameter, in the order of the layer spec, as a model computes with it.

        A matrix that is stored in the scheme keeps its values and scales (`stored_in`); another is
        quantised from its stored values. With adapters it is quantised after they are added.

        Args:
          dtype: The dtype of the computation, and of all parameters that are not quantised. If None
            each has the one in `dtypes`; but where the factors of matrix products have several,
            these are float32, or float64 beside float64; in a GGUF with quantised weights
            bfloat16.
          scheme: The scheme. If None what is stored quantised stays so, and nothing else is: in a
            GGUF only where neither a dtype nor a part is given.
          part: Takes the part of a parameter that is wanted, where a model is split; only its bytes
            are read where the format maps its file.

        Raises:
          ValueError: The scheme is unknown, or does not fit a matrix; the message names it. Or
            parts are wanted of what is quantised.
          ConfigError: The checkpoint is stored in another scheme.
        """
        dtypes = self._computed(dtype)
        for spec in self.specs:
            keeps = scheme or self.scheme or (dtype is None and part is None)
            value = self.quantized(spec, scheme) if keeps else self.read_parts(spec)
            computed = dtypes[spec.path]
            if not isinstance(value, Quantized):
                array = np.asarray(value)
                yield spec, cast(array if part is None else part(spec, array), computed)
            elif part is None:
                yield spec, value.replace(dtype=computed.name)
            else:
                raise UserError(
                    f"quantised weights are not split over devices, got {self.path} as "
                    f"{value.scheme}: load them without a mesh"
                )

    def quantized(self, spec: ParamSpec, scheme: str | None) -> np.ndarray | Stacked | Quantized:
        """A parameter as `read_as` gives it, but not cast."""
        if self.scheme and scheme not in (None, self.scheme):
            raise ConfigError(
                f"{self.path} is quantised as {self.scheme} already: quantise the checkpoint that "
                f"it was made from to get {scheme}"
            )
        adapted = self.adapters is not None and self.adapters.options.changes(spec)
        scheme = scheme or self.scheme
        value = self.read_parts(spec) if adapted else self.read_stored(spec, scheme)
        return quantize_parameter(spec, value, scheme)

    def stored_in(self, spec: ParamSpec) -> str | None:
        """The scheme that holds a parameter as it is stored, if it is stored quantised."""
        return scheme_for(spec, self.scheme)

    def read_stored(
        self, spec: ParamSpec, scheme: str | None = None
    ) -> np.ndarray | Stacked | Quantized:
        """A parameter as it is stored, without adapters; for a scheme that it is not in, dense."""
        kept = self.stored_in(spec)
        if kept is None or scheme not in (None, kept):
            return self.layout.decode(spec, self.fetch)
        values, scale, *rest = self.layout.decode_rows(spec, self.fetch_quantized)
        zero, dtype = rest[0] if rest else None, self.dtypes[spec.path].name
        return Quantized(values, scale, zero, kept, input_axis(spec), dtype)

    def fetch_quantized(self, name: str) -> Sequence[np.ndarray]:
        """Values, scales and zeros of a stored matrix, [N, ...], where its parameter has them."""
        raise NotImplementedError

    def _computed(self, dtype: np.dtype | None) -> dict[str, np.dtype]:
        """The dtypes that `read_as` gives, by path."""
        dtypes = {path: dtype or stored for path, stored in self.dtypes.items()}
        factors = [spec.path for spec in self.specs if not spec.wide]
        return dtypes | dict.fromkeys(factors, self._common(dtypes[path] for path in factors))

    def _common(self, dtypes: Iterable[np.dtype]) -> np.dtype:
        """The dtype of all factors of matrix products that have these unless one is asked for."""
        return common_dtype(dtypes)


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype of factors of matrix products: of several, float32, or float64 beside float64."""
    found = set(dtypes)
    several = max(DTYPES["float32"], *found, key=lambda dtype: dtype.itemsize)
    return several if len(found) > 1 else found.pop()


def around(weights: Path) -> list[Path]:
    """The folders that weights are in: by their name and, where it is a link, by its target."""
    return list(dict.fromkeys((weights.parent, weights.resolve().parent)))


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a `config.json`, ours or Hugging Face's.

    Raises:
      ConfigError: It is missing, or no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"the checkpoint folder {path.parent} lacks {path.name}{GIVE_CONFIG}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must be a JSON object, got {type(fields).__name__}")
    return fields


class Contents(NamedTuple):
    """What to write beside the values of parameters.

    Attributes:
      config: What the model is.
      dtypes: The dtype of each parameter, by path.
      name: The name of the weights, where a format gives them one ("2b-it").
      shard_size: Bytes in a safetensors file, at most.
      tokenizer: The tokenizer, where a format has files of its own for it.
      ocdbt: Whether an Orbax directory is a database, not a file for each array.
      special_ids: The special tokens' ids, where a config has them; the others are the
        tokenizer's, or the published vocabulary's.
      as_published: Whether Hugging Face's config is as published, where that differs from what
        `transformers` needs to compute the same.
      scheme: The scheme in which matrices are stored, if they are quantised.
    """

    config: Config
    dtypes: Mapping[str, np.dtype]
    name: str = ""
    shard_size: int = SHARD_SIZE
    tokenizer: Tokenizer | None = None
    ocdbt: bool = False
    special_ids: Mapping[str, Any] = MappingProxyType({})
    as_published: bool = False
    scheme: str | None = None


# Writes a stored tensor, by name, cast to the dtype of its parameters. A format's writer is a
# context manager that gives this for an empty folder; tensors come in the order of the layout.
Write = Callable[[str, np.ndarray | Stacked], None]
Writer = Callable[[Path, Contents], AbstractContextManager[Write]]


def require_size(tokenizer: Tokenizer, config: Config, name: object) -> None:
    """Raises `TokenizerError`, with the tokenizer's name, unless it fits the vocabulary."""
    if not tokenizer.fits(config.vocab_size):
        raise TokenizerError(
            f"{name} has {tokenizer.size} pieces, and the vocabulary {config.vocab_size} entries"
        )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by name: a tokenizer's."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
