"""Layers that one tensor holds together, as the library `gemma` scans over them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_STACKED = re.compile(r"(.*)stacked_layers[/.]attention_type_(\d+)([/.].*)")


class Place(NamedTuple):
    """Where a tensor is.

    Attributes:
      name: The stored tensor.
      slice: The tensor is this part along the first axis; all of it if None.
      shape: Its shape.
    """

    name: str
    slice: int | None
    shape: tuple[int, ...]


def places(stored: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of each tensor, under the name that it has where layers are apart.

    With a pattern of P kinds of layers, `stacked_layers/attention_type_i` holds layers i, i + P,
    i + 2 P, ... along its first axis.
    """
    kinds = {name: found for name in stored if (found := _STACKED.fullmatch(name))}
    pattern = 1 + max((int(found[2]) for found in kinds.values()), default=0)
    apart: dict[str, Place] = {}
    for name, shape in stored.items():
        if (found := kinds.get(name)) is None or not shape:
            apart[name] = Place(name, None, shape)
            continue
        for part in range(shape[0]):
            layer = f"{found[1]}layer_{part * pattern + int(found[2])}{found[3]}"
            apart[layer] = Place(name, part, shape[1:])
    return apart
