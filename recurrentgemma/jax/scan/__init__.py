"""The linear recurrence and its implementations."""

from recurrentgemma.jax.scan.dispatch import (
    IMPLEMENTATIONS,
    SCAN_TYPES,
    as_positions,
    choose_implementation,
    linear_scan,
    pallas_target,
    rg_lru_scan,
)
from recurrentgemma.jax.scan.gates import wide_dtype

__all__ = [
    "IMPLEMENTATIONS",
    "SCAN_TYPES",
    "as_positions",
    "choose_implementation",
    "linear_scan",
    "pallas_target",
    "rg_lru_scan",
    "wide_dtype",
]
