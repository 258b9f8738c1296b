"""The blocks of a Griffin model: recurrent, MLP, and the residual block around them."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Int

from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.jax.attention import LocalAttentionBlock
from recurrentgemma.jax.cache import RecurrentBlockCache, ResidualBlockCache
from recurrentgemma.jax.layers import Conv1D, Einsum, RMSNorm, SpecModule, gelu
from recurrentgemma.jax.rg_lru import RGLRU


class RecurrentBlock(SpecModule):
    """y = (gelu(x W_y) * RGLRU(conv(x W_x))) W_out."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_pos: Int[Array, "b t"],
        cache: RecurrentBlockCache | None = None,
    ) -> tuple[Float[Array, "b t d"], RecurrentBlockCache]:
        """Returns the outputs and the state after them."""
        rg_lru_state, conv1d_state = (None, None) if cache is None else cache
        y = gelu(self.linear("linear_y")(x))
        x = self.linear("linear_x")(x)
        x, conv1d_state = self.child(Conv1D, "conv_1d")(x, segment_pos, conv1d_state)
        x, rg_lru_state = self.child(RGLRU, "rg_lru")(x, segment_pos, rg_lru_state)
        return self.linear("linear_out")(x * y), RecurrentBlockCache(rg_lru_state, conv1d_state)


class MLPBlock(SpecModule):
    """y = (gelu(x W_0 + b_0) * (x W_1 + b_1)) W_down + b_down."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        gate, value = self.child(Einsum, "ffw_up")(x)
        return self.linear("ffw_down")(gelu(gate) * value)


TEMPORAL_BLOCKS = {
    TemporalBlockType.RECURRENT: ("recurrent_block", RecurrentBlock),
    TemporalBlockType.ATTENTION: ("attention_block", LocalAttentionBlock),
}


class ResidualBlock(SpecModule):
    """x + temporal(norm(x)), then x + mlp(norm(x)); its prefix is "blocks.N"."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_pos: Int[Array, "b t"],
        cache: ResidualBlockCache | None = None,
    ) -> tuple[Float[Array, "b t d"], ResidualBlockCache]:
        """Returns the outputs and the state after them."""
        index = int(self.prefix.removeprefix("blocks."))
        temporal_name, temporal_block = TEMPORAL_BLOCKS[self.config.block_types[index]]
        y = self.child(RMSNorm, "temporal_pre_norm")(x)
        y, new_cache = self.child(temporal_block, temporal_name)(y, segment_pos, cache)
        x = x + y
        y = self.child(RMSNorm, "channel_pre_norm")(x)
        return x + self.child(MLPBlock, "mlp_block")(y), new_cache
