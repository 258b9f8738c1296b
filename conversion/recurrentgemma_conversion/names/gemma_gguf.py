"""Gemma 1, 2 and 3 in a GGUF: their configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import ConfigError, UserError
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma_conversion.formats import Tensor
from recurrentgemma_conversion.names.gemma_config import VERSIONS


def from_metadata(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> GemmaConfig:
    """The config in a GGUF. Patterns, query scales and the sliding base follow published models.

    Raises:
      ConfigError: A key is missing or invalid.
    """
    kind = metadata["general.architecture"]

    def said(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ConfigError(f"{path} lacks {kind}.{key}")
        return value

    try:
        eps = said("attention.layer_norm_rms_epsilon")
        if not math.isclose(eps, 1e-6, rel_tol=1e-3):
            raise UserError(f"layer_norm_rms_epsilon must be 1e-6, got {eps}")
        heads, layers = said("attention.head_count"), said("block_count")
        if not isinstance(layers, int) or not 0 < layers <= 10_000:
            raise UserError(f"block_count must be from 1 to 10000, got {layers!r}")
        config = GemmaConfig.from_sizes(
            VERSIONS[kind],
            tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 1,
            said("embedding_length"),
            said("feed_forward_length"),
            layers,
            heads,
            said("attention.head_count_kv", heads),
            said("attention.key_length", said("embedding_length") // heads),
        )
        changes: dict[str, Any] = {
            "sliding_window": metadata.get(f"{kind}.attention.sliding_window"),
            "rope_base": metadata.get(f"{kind}.rope.freq_base"),
            "attention_soft_cap": metadata.get(f"{kind}.attn_logit_softcapping"),
            "logits_soft_cap": metadata.get(f"{kind}.final_logit_softcapping"),
        }
        if metadata.get(f"{kind}.rope.scaling.type", "none") == "linear":
            changes["rope_stretch"] = said("rope.scaling.factor")
        elif config.version == 3:
            changes["rope_stretch"] = 1.0
        given = {name: value for name, value in changes.items() if value is not None}
        return GemmaConfig.from_dict(config.to_dict() | given)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"{path}: {error}") from error
