"""How the arrays of a training state lie on the devices of a mesh, as a table."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from recurrentgemma.common.sharding import Split


class Placed(NamedTuple):
    """One array of a training state.

    Attributes:
      shape: The shape of the whole array, in the Flax layout.
      dtype: The name of its dtype.
      requested: The mesh axis that `common.sharding.layout` wants for each axis, or None.
      actual: The mesh axis that splits each axis now.
      num_bytes: The bytes that this process, or its first device, keeps.
    """

    shape: tuple[int, ...]
    dtype: str
    requested: Split
    actual: Split
    num_bytes: int


class StateLayout(dict[str, Placed]):
    """The arrays of a training state by name: "parameters.<path>", "mu.<path>", "base.<path>".

    Printed, it is a table with one line for arrays that differ in the number of their block alone.
    """

    @property
    def num_bytes(self) -> int:
        """The bytes of all arrays on this device."""
        return sum(placed.num_bytes for placed in self.values())

    @property
    def misplaced(self) -> list[str]:
        """The names of the arrays that are not split as requested."""
        return [name for name, placed in self.items() if placed.actual != placed.requested]

    def __str__(self) -> str:
        groups: dict[tuple, list[int]] = defaultdict(list)
        for name, placed in self.items():
            words = ["*" if word.isdigit() else word for word in name.split(".")]
            groups[".".join(words), *placed[:4]].append(placed.num_bytes)
        rows = [("array", "count", "shape", "split", "bytes")]
        for (name, shape, dtype, requested, actual), sizes in groups.items():
            split = _split(actual) if actual == requested else f"{_split(actual)} not {requested}"
            shown = f"{dtype} {list(shape)}"
            rows.append((name, str(len(sizes)), shown, split, f"{sum(sizes):,}"))
        rows.append(("all", str(len(self)), "", "", f"{self.num_bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (zip(row, widths, strict=True) for row in rows)
        return "\n".join("  ".join(c.ljust(width) for c, width in line).rstrip() for line in lines)


def _split(split: Split) -> str:
    return ", ".join(axis or "-" for axis in split)
