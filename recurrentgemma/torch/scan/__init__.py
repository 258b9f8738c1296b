"""The linear recurrence and its implementations."""

from recurrentgemma.torch.scan.dispatch import (
    IMPLEMENTATIONS,
    SCAN_TYPES,
    as_positions,
    choose_implementation,
    linear_scan,
    rg_lru_scan,
)
from recurrentgemma.torch.scan.gates import forward_levels, rg_lru_step, wide_dtype
from recurrentgemma.torch.scan.published import rnn_scan

__all__ = [
    "IMPLEMENTATIONS",
    "SCAN_TYPES",
    "as_positions",
    "choose_implementation",
    "forward_levels",
    "linear_scan",
    "rg_lru_scan",
    "rg_lru_step",
    "rnn_scan",
    "wide_dtype",
]
