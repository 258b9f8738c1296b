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


class AttentionType(enum.Enum):
    """Which keys before its own a query sees."""

    SLIDING = "sliding_attention"
    FULL = "full_attention"


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
    """The published configurations.

    Griffin and Hawk (arXiv 2402.19427), RecurrentGemma (2404.07839), Gemma (2403.08295), Gemma 2
    (2408.00118) and the text decoders of Gemma 3 (2503.19786). CodeGemma (2406.11409) has the
    shapes of Gemma.
    """

    GRIFFIN_PAPER_7B = "GRIFFIN_PAPER_7B"
    HAWK_PAPER_7B = "HAWK_PAPER_7B"
    RECURRENT_GEMMA_2B_V1 = "RECURRENT_GEMMA_2B_V1"
    RECURRENT_GEMMA_9B_V1 = "RECURRENT_GEMMA_9B_V1"
    GEMMA_2B = "GEMMA_2B"
    GEMMA_7B = "GEMMA_7B"
    CODEGEMMA_2B = GEMMA_2B
    CODEGEMMA_7B = GEMMA_7B
    GEMMA2_2B = "GEMMA2_2B"
    GEMMA2_9B = "GEMMA2_9B"
    GEMMA2_27B = "GEMMA2_27B"
    GEMMA3_270M = "GEMMA3_270M"
    GEMMA3_1B = "GEMMA3_1B"
    GEMMA3_4B = "GEMMA3_4B"
    GEMMA3_12B = "GEMMA3_12B"
    GEMMA3_27B = "GEMMA3_27B"

    @property
    def config_dict(self) -> dict[str, Any]:
        """The preset's fields, without `vocab_size`."""
        return dict(_PRESETS[self])

    @property
    def vocab_size(self) -> int:
        """Rows of the table of embeddings, as Hugging Face publishes it."""
        return _VOCABULARIES.get(self, 256_000)


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


def gemma_fields(
    version: int,
    width: int,
    mlp_width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, Any]:
    """The fields of a `GemmaConfig` of these sizes, by the rules that the published ones follow.

    A version's layers follow one pattern. Two sizes, known by their layers, scale queries by the
    width of a head in the stream instead of H; the three largest of Gemma 3 stretch positions.
    """
    sliding, full = AttentionType.SLIDING, AttentionType.FULL
    pattern = {1: [full], 2: [sliding, full], 3: [sliding] * 5 + [full]}[version]
    large = version == 3 and num_layers not in (18, 26)
    by_width = (version, num_layers) in ((2, 46), (3, 62))
    return {
        "version": version,
        "width": width,
        "mlp_width": mlp_width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "layer_types": tuple((pattern * num_layers)[:num_layers]),
        "sliding_window": {1: None, 2: 4096, 3: 1024 if large else 512}[version],
        "query_pre_attn_scalar": width / num_heads if by_width else float(head_dim),
        "rope_base": 1e6 if version == 3 else 10_000.0,
        "rope_stretch": 8.0 if large else 1.0,
        "attention_soft_cap": 50.0 if version == 2 else 0.0,
        "logits_soft_cap": 30.0 if version == 2 else 0.0,
    }


_PRESETS |= {
    Preset.GEMMA_2B: gemma_fields(1, 2048, 16384, 18, 8, 1, 256),
    Preset.GEMMA_7B: gemma_fields(1, 3072, 24576, 28, 16, 16, 256),
    Preset.GEMMA2_2B: gemma_fields(2, 2304, 9216, 26, 8, 4, 256),
    Preset.GEMMA2_9B: gemma_fields(2, 3584, 14336, 42, 16, 8, 256),
    Preset.GEMMA2_27B: gemma_fields(2, 4608, 36864, 46, 32, 16, 128),
    Preset.GEMMA3_270M: gemma_fields(3, 640, 2048, 18, 4, 1, 256),
    Preset.GEMMA3_1B: gemma_fields(3, 1152, 6912, 26, 4, 1, 256),
    Preset.GEMMA3_4B: gemma_fields(3, 2560, 10240, 34, 8, 4, 256),
    Preset.GEMMA3_12B: gemma_fields(3, 3840, 15360, 48, 16, 8, 256),
    Preset.GEMMA3_27B: gemma_fields(3, 5376, 21504, 62, 32, 16, 128),
}
_VOCABULARIES = {
    Preset.GEMMA3_270M: 262_144,
    Preset.GEMMA3_1B: 262_144,
    Preset.GEMMA3_4B: 262_208,
    Preset.GEMMA3_12B: 262_208,
    Preset.GEMMA3_27B: 262_208,
}


def member(kind: type[_E], value: _E | str) -> _E:
    """`value` as a member of an enumeration, by identity, value or name."""
    if isinstance(value, kind):
        return value
    for name, candidate in kind.__members__.items():
        if value in (candidate.value, name):
            return candidate
    choices = ", ".join(kind.__members__)
    raise UserError(f"{value!r} is no {kind.__name__}; choose from {choices}")
