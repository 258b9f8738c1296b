"""What the formats call parameters and configs: one module a model family.

A family is in `FAMILIES`; a format that it has no table for holds the parameters as the twins do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from recurrentgemma.common.errors import ConfigError, NotRecurrentGemmaError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names.family import Family
from recurrentgemma_conversion.names.griffin import GRIFFIN
from recurrentgemma_conversion.names.own import flax_layout, torch_layout
from recurrentgemma_conversion.names.table import Layout, lay_out

FAMILIES = (GRIFFIN,)
# Names of tensors in the Gemma family; RecurrentGemma has none of them.
_GEMMA = ("self_attn.", "qkv_proj", "attn_vec_einsum", "qkv_einsum", "q_einsum", "layer_0.")


def family_of(config: Config) -> Family | None:
    """The family of a config; None where no format but ours has names for its parameters."""
    return next((family for family in FAMILIES if isinstance(config, family.config)), None)


@functools.lru_cache(maxsize=32)
def layout(config: Config, format_: Format) -> Layout:
    """How a format stores the parameters of a model.

    Raises:
      ConfigError: The format has no names for some of them.
    """
    specs, family = layer_spec(config), family_of(config)
    if family is not None and format_ in family.tables:
        sizes = functools.partial(family.sizes, config)
        return lay_out(specs, family.tables[format_], format_, sizes)
    if format_ is Format.HUGGINGFACE:
        raise ConfigError(f"{format_} has no names for the parameters of {type(config).__name__}")
    return flax_layout(specs) if format_ is Format.KAGGLE_FLAX else torch_layout(specs)


def require_known(path: Path, names: Iterable[str]) -> None:
    """Raises `NotRecurrentGemmaError` for the tensors of another model."""
    dotted = (name.replace("/", ".") for name in names)
    telling = next((name for name in dotted if any(mark in name for mark in _GEMMA)), None)
    if telling is not None:
        raise NotRecurrentGemmaError(
            f"{path} is a Gemma checkpoint, a transformer: it has {telling!r}; RecurrentGemma's "
            "recurrent blocks are needed"
        )
