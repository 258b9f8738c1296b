"""What the formats need to know of a model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import ConfigError
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names.table import Rule
from recurrentgemma_conversion.overrides import Overrides

# A field of ours in `config.json`: a window counts the query's own key, as in `transformers`.
COUNTS_ITSELF = "attention_window_counts_itself"


def _nothing(config: Any) -> tuple[str, ...]:
    return ()


def _unchanged(fields: dict[str, Any]) -> dict[str, Any]:
    return fields


def _no_sizes(config: Any, block: int | None) -> Mapping[str, int]:
    return {}


def _no_metadata(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    raise ConfigError(f"{path}: no such model is known in this format")


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family in the formats.

    Attributes:
      config: The class of its configs.
      model_types: The values of `model_type` in Hugging Face's `config.json`.
      tables: Names and axes for a config, by format; the other formats of ours hold the
        parameters as the twins do.
      resolve: Its config from the tensors, the config that is stated (or None) and the overrides.
      sized: A config with the parameters that tensors have. Fields on which no parameter depends
        hold any value.
      from_fields: Its config from the fields of Hugging Face's `config.json`.
      to_fields: The fields from its config and the name of a dtype, with which `transformers`
        computes the same.
      as_published: Turns these fields into those of the published checkpoints.
      fields_note: How they differ from those, in a line, if they do.
      not_in_transformers: What a config asks for that `transformers` does not have.
      modules: What `transformers` calls modules, by our names, where these differ.
      release: What Kaggle calls the weights of a size.
      sizes: Sizes of axes that the tables split, by letter, from the config and a block's number.
      marks: Parts of tensors' names that tell the family where no config does.
      other_parts: A pattern for tensors of other parts of a checkpoint, such as a vision encoder.
      buffers: A pattern for tensors that are computed from the config.
      level: The key that holds the state dict in a file of PyTorch, if there is one.
      architectures: The values of `general.architecture` in a GGUF.
      from_metadata: Its config from the metadata and the tensors of a GGUF.
    """

    config: type
    model_types: tuple[str, ...]
    tables: Mapping[Format, Callable[[Any], Sequence[Rule]]]
    resolve: Callable[[Mapping[str, Tensor], Any, Overrides], Any]
    sized: Callable[[Mapping[str, Tensor]], Any]
    from_fields: Callable[[Path, Mapping[str, Any]], Any]
    to_fields: Callable[[Any, str], dict[str, Any]]
    release: Callable[[Any], str]
    sizes: Callable[[Any, int | None], Mapping[str, int]] = _no_sizes
    marks: tuple[str, ...] = ()
    other_parts: str = "$^"
    buffers: str = "$^"
    level: str = ""
    as_published: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    fields_note: Callable[[Any], Sequence[str]] = _nothing
    not_in_transformers: Callable[[Any], Sequence[str]] = _nothing
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    architectures: tuple[str, ...] = ()
    from_metadata: Callable[[Path, Mapping[str, Any], Mapping[str, Tensor]], Any] = _no_metadata
