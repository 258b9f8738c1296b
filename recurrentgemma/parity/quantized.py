"""Quantised weights in both twins and in the definition: the same bytes, the same int32 sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recurrentgemma.common import quantization
from recurrentgemma.common.quantization import Quantized
from recurrentgemma.common.twin import Twin

_ROWS = 3  # and one of zeros
_SCHEME = "q8"  # has products in integers


class Differences(NamedTuple):
    """The quantised parameters in which something differs, by path.

    Attributes:
      matrices: How many were compared.
      stored: Those whose values, scales or zeros differ in a bit.
      rows: Those of whose inputs the quantised rows or their scales differ in a bit.
      sums: Those whose int32 sums differ.
    """

    matrices: int
    stored: list[str]
    rows: list[str]
    sums: list[str]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.stored or self.rows or self.sums)

    def __str__(self) -> str:
        if self.equal:
            return f"{self.matrices} matrices, bytes and int32 sums equal to the bit in NumPy, too"
        fields = {name: getattr(self, name) for name in ("stored", "rows", "sums")}
        parts = (f"{name} of {', '.join(paths)}" for name, paths in fields.items() if paths)
        return f"different {'; '.join(parts)}"


def compare_quantized(
    twins: Sequence[Twin], held: Sequence[Mapping[str, Quantized]], seed: int = 0
) -> Differences:
    """Compares each twin's quantised parameters and products with NumPy's.

    Args:
      twins: The twins.
      held: The quantised parameters of one model in each (`Twin.quantized`).
      seed: The seed of the rows that are multiplied.
    """
    rng, found = np.random.default_rng(seed), Differences(len(held[0]), [], [], [])
    for path, first in held[0].items():
        on_host = first.with_parts(twins[0].to_numpy)
        given = [one[path].with_parts(twin.to_numpy) for twin, one in zip(twins, held, strict=True)]
        parts = on_host.parts
        if not all(_same(parts[name], other.parts[name]) for other in given for name in parts):
            found.stored.append(path)
        if first.scheme != _SCHEME:
            continue
        x = rng.standard_normal((*first.values.shape[:-2], _ROWS, first.values.shape[-1]))
        x = np.concatenate([x, np.zeros_like(x[..., :1, :])], -2).astype(np.float32)
        rows, scale = quantization.quantize_rows(x)
        sums = quantization.integer_sums(rows, on_host.values)
        for twin, one in zip(twins, held, strict=True):
            own = twin.products.quantize_rows(twin.from_numpy(x, "float32"))
            if not all(map(_same, (rows, scale), map(twin.to_numpy, own))):
                found.rows.append(path)
            product = twin.products.integer_sums(twin.from_numpy(rows, "int8"), one[path].values)
            if not _same(sums, twin.to_numpy(product)):
                found.sums.append(path)
    return found


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)
