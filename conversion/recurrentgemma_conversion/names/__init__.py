"""What the formats call parameters and configs: one module a model family.

A family is in `FAMILIES`; a format that it has no table for holds the parameters as the twins do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names.compressed import COMPRESSED
from recurrentgemma_conversion.names.family import Family
from recurrentgemma_conversion.names.gemma import GEMMA
from recurrentgemma_conversion.names.griffin import GRIFFIN
from recurrentgemma_conversion.names.others import other_model
from recurrentgemma_conversion.names.own import flax_layout, torch_layout
from recurrentgemma_conversion.names.storage import OURS
from recurrentgemma_conversion.names.table import Layout, lay_out

FAMILIES = (GRIFFIN, GEMMA)
Shapes = Mapping[str, tuple[int, ...]]


def family_of(config: Config) -> Family | None:
    """The family of a config; None where no format but ours has names for its parameters."""
    return next((family for family in FAMILIES if isinstance(config, family.config)), None)


def family_named(names: Iterable[str]) -> Family:
    """The family that the names of tensors tell; the first where they tell none."""
    text = "\n".join(names)
    return next((f for f in FAMILIES if any(mark in text for mark in f.marks)), FAMILIES[0])


def other_parts(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The tensors that are no parameters of a family: of other parts, and computed ones."""
    listed = list(names)
    parts, buffers = (
        [name for name in listed if any(re.search(pattern, name) for pattern in patterns)]
        for patterns in ([f.other_parts for f in FAMILIES], [f.buffers for f in FAMILIES])
    )
    return parts, buffers


def config_from_fields(path: Path, fields: Mapping[str, Any]) -> Any:
    """The config that Hugging Face's `config.json` states.

    Raises:
      OtherModelError: It is another model's.
      ConfigError: It is incomplete, or asks for what the model does not have.
    """
    kind = fields.get("model_type")
    family = next((family for family in FAMILIES if kind in family.model_types), None)
    if family is None:
        known = [kind for family in FAMILIES for kind in family.model_types]
        raise other_model(path, "model_type", kind, known)
    return family.from_fields(path, fields)


def config_from_metadata(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Any:
    """The config that the metadata of a GGUF state; errors are those of `config_from_fields`."""
    kind = metadata.get("general.architecture")
    family = next((family for family in FAMILIES if kind in family.architectures), None)
    if family is None:
        known = [kind for family in FAMILIES for kind in family.architectures]
        raise other_model(path, "general.architecture", kind, known)
    return family.from_metadata(path, metadata, tensors)


def layout(config: Config, format_: Format, stored: Shapes = MappingProxyType({})) -> Layout:
    """How a format stores the parameters of a model.

    Args:
      config: What the model is.
      format_: The format.
      stored: The shapes of the tensors in a checkpoint, where a format has several layouts.

    Raises:
      ConfigError: The format has no names for some of them.
    """
    return _layout(config, format_, tuple(stored.items()))


@functools.lru_cache(maxsize=32)
def _layout(config: Config, format_: Format, stored: tuple[Any, ...]) -> Layout:
    specs, family = layer_spec(config), family_of(config)
    if family is not None and format_ in family.tables:
        sizes = functools.partial(family.sizes, config)
        storage = COMPRESSED if format_ is Format.HUGGINGFACE else OURS
        rules = family.tables[format_](config)
        return lay_out(specs, rules, format_, sizes, dict(stored), storage)
    if format_ in (Format.HUGGINGFACE, Format.GGUF):
        raise ConfigError(f"{format_} has no names for the parameters of {type(config).__name__}")
    return flax_layout(specs) if format_ is Format.KAGGLE_FLAX else torch_layout(specs)
