"""The enumerations of a configuration and the published presets."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, TypeVar

from recurrentgemma.common.errors import UserError

_E = TypeVar("_E", bound=enum.Enum)


class TemporalBlockType(enum.Enum):
    """How a residual block mixes information over time."""

    ATTENTION = "attention"
    RECURRENT = "recurrent"


class ScanChoice(NamedTuple):
    """An implementation of the recurrence, and why it."""

    name: str
    reason: str


class ScanType(enum.Enum):
    """Which implementation computes the RG-LRU's linear recurrence."""

    AUTO = "auto"
    LINEAR_NATIVE = "linear_native"
    ASSOCIATIVE_NATIVE = "associative_native"
    LINEAR_PALLAS = "linear_pallas"


class Preset(enum.Enum):
    """The published configurations (arXiv 2402.19427 and 2404.07839)."""

    GRIFFIN_PAPER_7B = "GRIFFIN_PAPER_7B"
    HAWK_PAPER_7B = "HAWK_PAPER_7B"
    RECURRENT_GEMMA_2B_V1 = "RECURRENT_GEMMA_2B_V1"
    RECURRENT_GEMMA_9B_V1 = "RECURRENT_GEMMA_9B_V1"

    @property
    def config_dict(self) -> dict[str, Any]:
        """The preset's fields, without `vocab_size`."""
        return dict(_PRESETS[self])


def _griffin_pattern(num_layers: int) -> tuple[TemporalBlockType, ...]:
    """Two recurrent blocks, then one of local attention, repeated."""
    attention, recurrent = TemporalBlockType.ATTENTION, TemporalBlockType.RECURRENT
    return tuple(attention if i % 3 == 2 else recurrent for i in range(num_layers))


_GEMMA = {
    "embeddings_scale_by_sqrt_dim": True,
    "attention_window_size": 2048,
    "logits_soft_cap": 30.0,
}
_PAPER_7B = {
    "width": 4096,
    "mlp_expanded_width": 12288,
    "num_heads": 32,
    "lru_width": 5632,
    "embeddings_scale_by_sqrt_dim": False,
    "attention_window_size": 1024,
    "logits_soft_cap": 0.0,
}
_PRESETS: dict[Preset, dict[str, Any]] = {
    Preset.RECURRENT_GEMMA_2B_V1: _GEMMA
    | {
        "width": 2560,
        "mlp_expanded_width": 7680,
        "num_heads": 10,
        "lru_width": 2560,
        "block_types": _griffin_pattern(26),
    },
    Preset.RECURRENT_GEMMA_9B_V1: _GEMMA
    | {
        "width": 4096,
        "mlp_expanded_width": 12288,
        "num_heads": 16,
        "lru_width": 4096,
        "block_types": _griffin_pattern(38),
    },
    Preset.GRIFFIN_PAPER_7B: _PAPER_7B | {"block_types": _griffin_pattern(32)},
    Preset.HAWK_PAPER_7B: _PAPER_7B | {"block_types": (TemporalBlockType.RECURRENT,) * 32},
}


def member(kind: type[_E], value: _E | str) -> _E:
    """`value` as a member of an enumeration, by identity, value or name."""
    if isinstance(value, kind):
        return value
    for candidate in kind:
        if value in (candidate.value, candidate.name):
            return candidate
    choices = ", ".join(candidate.name for candidate in kind)
    raise UserError(f"{value!r} is no {kind.__name__}; choose from {choices}")
