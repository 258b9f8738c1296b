"""The blocks under their published names, built from the published arguments.

They live in `blocks`, `attention`, `layers` and `cache`; the classes here only translate sizes.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Integer

from recurrentgemma.common.model.griffin import local_attention, published_layer
from recurrentgemma.common.model.mixers import (
    AttentionBlockCache,
    Recurrent,
    RecurrentBlockCache,
)
from recurrentgemma.common.model.numerics import to_bfloat16
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.jax import blocks, layers
from recurrentgemma.jax.attention import AttentionBlock
from recurrentgemma.jax.blocks import MLPBlock
from recurrentgemma.jax.cache import empty_block
from recurrentgemma.jax.layers import SpecModule

__all__ = [
    "AttentionBlockCache",
    "Embedder",
    "LocalAttentionBlock",
    "MLPBlock",
    "RecurrentBlock",
    "RecurrentBlockCache",
    "ResidualBlock",
    "ResidualBlockCache",
]
ResidualBlockCache = RecurrentBlockCache | AttentionBlockCache


class _Facade(SpecModule):
    """A module with the parameters of the one that it builds from its own sizes."""

    def build(self) -> Any:
        """The module that does the work."""
        raise NotImplementedError

    def setup(self) -> None:
        self.inner = self.build()
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Embedder(_Facade):
    """Token embeddings, scaled by sqrt(D) or not."""

    vocab_size: int
    embed_dim: int
    scale_by_sqrt_dim: bool

    def build(self) -> layers.Embedder:
        scale = to_bfloat16(math.sqrt(self.embed_dim)) if self.scale_by_sqrt_dim else 1.0
        return layers.Embedder(self.vocab_size, self.embed_dim, scale, **self.settings)

    def encode(self, tokens: Integer[Array, "b t"]) -> Float[Array, "b t d"]:
        """The embeddings, times the scale."""
        return self.inner.encode(tokens)

    def decode(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits in float32 (float64 beside float64)."""
        return self.inner.decode(x)


class LocalAttentionBlock(_Facade):
    """Multi-query attention in which a token sees itself and the W tokens before it."""

    width: int
    num_heads: int
    window_size: int
    final_w_init_variance_scale: float = 1.0

    def build(self) -> AttentionBlock:
        mixer = local_attention(self.width, self.num_heads, self.window_size)
        sizes = (self.width, mixer, self.final_w_init_variance_scale)
        return AttentionBlock(*sizes, **self.settings)

    @classmethod
    def init_cache(
        cls, batch_size: int, window_size: int, heads_dim: int, dtype: Dtype
    ) -> AttentionBlockCache:
        """The state before the first token."""
        return empty_block(local_attention(heads_dim, 1, window_size), batch_size, dtype)


class RecurrentBlock(blocks.RecurrentBlock):
    """The recurrent block, with the published way to make its state."""

    @classmethod
    def init_cache(
        cls, batch_size: int, lru_width: int, dtype: Dtype, conv1d_temporal_width: int = 4
    ) -> RecurrentBlockCache:
        """The state before the first token."""
        return empty_block(Recurrent(lru_width, 1, conv1d_temporal_width), batch_size, dtype)


class ResidualBlock(_Facade):
    """A residual block of either type."""

    width: int
    mlp_expanded_width: int
    num_heads: int
    attention_window_size: int
    temporal_block_type: TemporalBlockType
    lru_width: int | None = None
    conv1d_temporal_width: int = 4
    final_w_init_variance_scale: float = 1.0

    def build(self) -> blocks.Block:
        sizes = (self.width, self.num_heads, self.attention_window_size)
        sizes = (*sizes, self.lru_width, self.conv1d_temporal_width, self.mlp_expanded_width)
        layer = published_layer(self.temporal_block_type, *sizes)
        variance = self.final_w_init_variance_scale
        return blocks.Block(self.width, layer, variance, **self.settings)

    @classmethod
    def init_cache(
        cls,
        batch_size: int,
        width: int,
        num_heads: int,
        attention_window_size: int,
        temporal_block_type: TemporalBlockType,
        dtype: Dtype,
        lru_width: int | None = None,
        conv1d_temporal_width: int = 4,
    ) -> Any:
        """The state before the first token."""
        sizes = (width, num_heads, attention_window_size, lru_width, conv1d_temporal_width)
        return empty_block(published_layer(temporal_block_type, *sizes).mixer, batch_size, dtype)
