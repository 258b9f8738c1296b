"""Numbers as users have them: Python's, NumPy's, arrays of one element of any framework."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def plain(value: Any) -> Any:
    """A NumPy scalar or an array of one element as a number of Python; others as they are."""
    is_one = hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1
    return value.item() if is_one else value


def make_plain(options: Any) -> None:
    """Makes the numbers in the fields of a frozen dataclass Python's: what they are hashed by."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))
