"""What the formats need to know of a model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names.table import Rule
from recurrentgemma_conversion.overrides import Overrides


def _no_sizes(config: Any, block: int | None) -> Mapping[str, int]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family in the formats.

    Attributes:
      config: The class of its configs.
      tables: Names and axes, by format; the other formats of ours hold it as the twins do.
      resolve: Its config from the tensors, the config that is stated (or None) and the overrides.
      sized: A config with the parameters that tensors have. Fields on which no parameter depends
        hold any value.
      from_fields: Its config from the fields of Hugging Face's `config.json`.
      to_fields: The fields from its config and the name of a dtype.
      release: What Kaggle calls the weights of a size.
      sizes: Sizes of axes that the tables split, by letter, from the config and a block's number.
    """

    config: type
    tables: Mapping[Format, Sequence[Rule]]
    resolve: Callable[[Mapping[str, Tensor], Any, Overrides], Any]
    sized: Callable[[Mapping[str, Tensor]], Any]
    from_fields: Callable[[Path, Mapping[str, Any]], Any]
    to_fields: Callable[[Any, str], dict[str, Any]]
    release: Callable[[Any], str]
    sizes: Callable[[Any, int | None], Mapping[str, int]] = _no_sizes
