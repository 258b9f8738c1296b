"""The linear recurrence and its implementations."""

from recurrentgemma.jax.runtime.targets import pallas_target
from recurrentgemma.jax.scan.dispatch import (
    IMPLEMENTATIONS,
    SCAN_TYPES,
    as_positions,
    choose_implementation,
    linear_scan,
    rg_lru_scan,
)
from recurrentgemma.jax.scan.gates import wide_dtype
from recurrentgemma.jax.scan.published import (
    lru_associative_scan,
    lru_linear_scan,
    resolve_scan_type,
    single_shard_rnn_scan,
)

__all__ = [
    "IMPLEMENTATIONS",
    "SCAN_TYPES",
    "as_positions",
    "choose_implementation",
    "linear_scan",
    "lru_associative_scan",
    "lru_linear_scan",
    "pallas_target",
    "resolve_scan_type",
    "rg_lru_scan",
    "single_shard_rnn_scan",
    "wide_dtype",
]
