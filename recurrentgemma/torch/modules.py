"""The blocks under their published names, built from the published arguments.

They live in `blocks`, `attention`, `layers` and `cache`; the classes here only translate sizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recurrentgemma.common.model.griffin import local_attention, published_layer
from recurrentgemma.common.model.mixers import (
    AttentionBlockCache,
    Recurrent,
    RecurrentBlockCache,
)
from recurrentgemma.common.model.numerics import to_bfloat16
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.torch import blocks, layers
from recurrentgemma.torch.attention import AttentionBlock
from recurrentgemma.torch.blocks import MLPBlock
from recurrentgemma.torch.cache import empty_block

__all__ = [
    "AttentionBlockCache",
    "Embedder",
    "LocalAttentionBlock",
    "MLPBlock",
    "RecurrentBlock",
    "RecurrentBlockCache",
    "ResidualBlock",
    "ResidualBlockCache",
    "gelu",
]
ResidualBlockCache = RecurrentBlockCache | AttentionBlockCache


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) in its tanh form."""
    return nn.functional.gelu(x, approximate="tanh")


class Embedder(layers.Embedder):
    """Token embeddings, scaled by sqrt(D) or not."""

    def __init__(
        self, vocab_size: int, embed_dim: int, scale_by_sqrt_dim: bool, device=None, dtype=None
    ) -> None:
        scale = to_bfloat16(math.sqrt(embed_dim)) if scale_by_sqrt_dim else 1.0
        super().__init__(vocab_size, embed_dim, scale, device=device, dtype=dtype)


class LocalAttentionBlock(AttentionBlock):
    """Multi-query attention in which a token sees itself and the W tokens before it."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        window_size: int,
        final_w_init_variance_scale: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        mixer = local_attention(width, num_heads, window_size)
        super().__init__(width, mixer, final_w_init_variance_scale, device, dtype)

    @classmethod
    def init_cache(
        cls, batch_size: int, window_size: int, heads_dim: int, dtype: torch.dtype, device=None
    ) -> AttentionBlockCache:
        """The state before the first token."""
        mixer = local_attention(heads_dim, 1, window_size)
        return empty_block(mixer, batch_size, dtype, device)


class RecurrentBlock(blocks.RecurrentBlock):
    """The recurrent block, with the published way to make its state."""

    @classmethod
    def init_cache(
        cls,
        batch_size: int,
        lru_width: int,
        dtype: torch.dtype,
        conv1d_temporal_width: int = 4,
        device=None,
    ) -> RecurrentBlockCache:
        """The state before the first token."""
        mixer = Recurrent(lru_width, 1, conv1d_temporal_width)
        return empty_block(mixer, batch_size, dtype, device)


class ResidualBlock(blocks.Block):
    """A residual block of either type."""

    def __init__(
        self,
        width: int,
        mlp_expanded_width: int,
        num_heads: int,
        attention_window_size: int,
        temporal_block_type: TemporalBlockType,
        lru_width: int | None = None,
        conv1d_temporal_width: int = 4,
        final_w_init_variance_scale: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        sizes = (width, num_heads, attention_window_size, lru_width, conv1d_temporal_width)
        layer = published_layer(temporal_block_type, *sizes, mlp_expanded_width)
        super().__init__(width, layer, final_w_init_variance_scale, device, dtype)

    @classmethod
    def init_cache(
        cls,
        batch_size: int,
        width: int,
        num_heads: int,
        attention_window_size: int,
        temporal_block_type: TemporalBlockType,
        dtype: torch.dtype,
        lru_width: int | None = None,
        conv1d_temporal_width: int = 4,
        device=None,
    ) -> Any:
        """The state before the first token."""
        sizes = (width, num_heads, attention_window_size, lru_width, conv1d_temporal_width)
        mixer = published_layer(temporal_block_type, *sizes).mixer
        return empty_block(mixer, batch_size, dtype, device)
