"""The blocks of a model: recurrent, MLP, and the residual block around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from recurrentgemma.common.model.config import Layer
from recurrentgemma.common.model.mixers import Attention, Recurrent, RecurrentBlockCache, block_name
from recurrentgemma.jax.attention import AttentionBlock
from recurrentgemma.jax.cache import Hidden, Positions
from recurrentgemma.jax.layers import MATRICES, Conv1D, Einsum, RMSNorm, SpecModule, gelu
from recurrentgemma.jax.rg_lru import RGLRU


class RecurrentBlock(SpecModule):
    """y = (gelu(x W_y) * RGLRU(conv(x W_x))) W_out."""

    width: int
    num_heads: int
    lru_width: int | None = None
    conv1d_temporal_width: int = 4
    final_w_init_variance_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them."""
        width, lru_width = self.width, self.lru_width or self.width
        rg_lru_state, conv1d_state = (None, None) if cache is None else cache
        y = gelu(self.linear("linear_y", width, lru_width)(x))
        x = self.linear("linear_x", width, lru_width)(x)
        conv_1d = self.child(Conv1D, "conv_1d", lru_width, self.conv1d_temporal_width)
        x, conv1d_state = conv_1d(x, segment_pos, conv1d_state)
        rg_lru = self.child(RGLRU, "rg_lru", lru_width, self.num_heads)
        x, rg_lru_state = rg_lru(x, segment_pos, rg_lru_state)
        new_cache = RecurrentBlockCache(rg_lru_state, conv1d_state) if return_cache else None
        variance = self.final_w_init_variance_scale
        return self.linear("linear_out", lru_width, width, True, variance)(x * y), new_cache


class MLPBlock(SpecModule):
    """y = (gelu(x W_0 + b_0) * (x W_1 + b_1)) W_down + b_down."""

    width: int
    expanded_width: int
    final_w_init_variance_scale: float = 1.0
    bias: bool = True

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        width, expanded = self.width, self.expanded_width
        w_shape, b_shape = (2, width, expanded), (2, 1, 1, expanded) if self.bias else None
        gate, value = self.child(Einsum, "ffw_up", w_shape, b_shape, MATRICES)(x)
        variance = self.final_w_init_variance_scale
        ffw_down = self.linear("ffw_down", expanded, width, self.bias, variance)
        return ffw_down(gelu(gate) * value)


# What makes the block of each mixer, by its class, from (width, mixer, variance of the output's
# initial values, settings); a new mixer adds itself here.
MIXERS: dict[type, Callable[..., nn.Module]] = {
    Recurrent: lambda width, mixer, variance, **settings: RecurrentBlock(
        width, mixer.gate_blocks, mixer.width, mixer.taps, variance, **settings
    ),
    Attention: AttentionBlock,
}


class Block(SpecModule):
    """x + mixer(norm(x)), then x + mlp(norm(x)); with post norms around both outputs."""

    width: int
    layer: Layer
    final_w_init_variance_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them."""
        width, layer, variance = self.width, self.layer, self.final_w_init_variance_scale
        mixer, name = layer.mixer, block_name(layer.mixer)
        temporal_block = MIXERS[type(mixer)](width, mixer, variance, **self.settings, name=name)
        y = self.child(RMSNorm, "temporal_pre_norm", width)(x)
        y, new_cache = temporal_block(y, segment_pos, cache)
        x = x + (self.child(RMSNorm, "temporal_post_norm", width)(y) if layer.post_norms else y)
        y = self.child(RMSNorm, "channel_pre_norm", width)(x)
        y = self.child(MLPBlock, "mlp_block", width, layer.mlp, variance, layer.mlp_bias)(y)
        y = self.child(RMSNorm, "channel_post_norm", width)(y) if layer.post_norms else y
        return x + y, new_cache if return_cache else None
