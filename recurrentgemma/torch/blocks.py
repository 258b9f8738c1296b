"""The blocks of a model: recurrent, MLP, and the residual block around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.functional import gelu

from recurrentgemma.common.model.config import Layer
from recurrentgemma.common.model.mixers import Attention, Recurrent, RecurrentBlockCache, block_name
from recurrentgemma.common.model.presets import ScanType
from recurrentgemma.torch.attention import AttentionBlock
from recurrentgemma.torch.cache import Hidden, Positions
from recurrentgemma.torch.layers import MATRICES, Conv1D, Einsum, Linear, RMSNorm, SpecModule
from recurrentgemma.torch.rg_lru import RGLRU
from recurrentgemma.torch.runtime.neighbours import Before


class RecurrentBlock(SpecModule):
    """y = (gelu(x W_y) * RGLRU(conv(x W_x))) W_out."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        lru_width: int | None = None,
        conv1d_temporal_width: int = 4,
        final_w_init_variance_scale=1.0,
        device=None,
        dtype=None,
        scan_type: ScanType = ScanType.AUTO,
    ) -> None:
        super().__init__()
        lru_width, meta = lru_width or width, {"device": "meta", "dtype": dtype}
        self.linear_y = Linear(width, lru_width, dtype=dtype)
        self.linear_x = Linear(width, lru_width, dtype=dtype)
        self.conv_1d = Conv1D(lru_width, conv1d_temporal_width, **meta)
        self.rg_lru = RGLRU(lru_width, num_heads, scan_type=scan_type, **meta)
        self.linear_out = Linear(lru_width, width, True, final_w_init_variance_scale, dtype)
        self.materialise(device)

    def forward(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them."""
        both = (cache, cache) if cache is None or isinstance(cache, Before) else cache
        rg_lru_state, conv1d_state = both
        x = self.team.shared(x)
        y = gelu(self.linear_y(x), approximate="tanh")
        x = self.linear_x(x)
        x, conv1d_state = self.conv_1d(x, segment_pos, conv1d_state)
        x, rg_lru_state = self.rg_lru(x, segment_pos, rg_lru_state)
        new_cache = RecurrentBlockCache(rg_lru_state, conv1d_state) if return_cache else None
        return self.linear_out(x * y), new_cache


class MLPBlock(SpecModule):
    """y = (gelu(x W_0 + b_0) * (x W_1 + b_1)) W_down + b_down."""

    def __init__(
        self,
        width: int,
        expanded_width: int,
        final_w_init_variance_scale=1.0,
        device=None,
        dtype=None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        w_shape, b_shape = (2, width, expanded_width), (2, 1, 1, expanded_width) if bias else None
        self.ffw_up = Einsum(w_shape, b_shape, MATRICES, device="meta", dtype=dtype)
        self.ffw_down = Linear(expanded_width, width, bias, final_w_init_variance_scale, dtype)
        self.materialise(device)

    def forward(self, x: Hidden) -> Hidden:
        gate, value = self.ffw_up(self.team.shared(x))
        return self.ffw_down(gelu(gate, approximate="tanh") * value)


# What makes the block of each mixer, by its class, on "meta"; a new mixer adds itself here.
MIXERS: dict[type, Callable[..., nn.Module]] = {
    Recurrent: lambda width, mixer, variance, scan_type, dtype: RecurrentBlock(
        width, mixer.gate_blocks, mixer.width, mixer.taps, variance, "meta", dtype, scan_type
    ),
    Attention: lambda width, mixer, variance, scan_type, dtype: AttentionBlock(
        width, mixer, variance, "meta", dtype
    ),
}


class Block(SpecModule):
    """x + mixer(norm(x)), then x + mlp(norm(x)); with post norms around both outputs."""

    def __init__(
        self,
        width: int,
        layer: Layer,
        final_w_init_variance_scale=1.0,
        device=None,
        dtype=None,
        scan_type: ScanType = ScanType.AUTO,
    ) -> None:
        super().__init__()
        self.layer, self.temporal_name = layer, block_name(layer.mixer)
        meta, variance = {"device": "meta", "dtype": dtype}, final_w_init_variance_scale
        mixer = MIXERS[type(layer.mixer)](width, layer.mixer, variance, scan_type, dtype)
        self.temporal_pre_norm = RMSNorm(width, **meta)
        self.add_module(self.temporal_name, mixer)
        self.temporal_post_norm = RMSNorm(width, **meta) if layer.post_norms else nn.Identity()
        self.channel_pre_norm = RMSNorm(width, **meta)
        self.mlp_block = MLPBlock(width, layer.mlp, variance, bias=layer.mlp_bias, **meta)
        self.channel_post_norm = RMSNorm(width, **meta) if layer.post_norms else nn.Identity()
        self.materialise(device)

    def forward(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them."""
        temporal_block = getattr(self, self.temporal_name)
        y, new_cache = temporal_block(self.temporal_pre_norm(x), segment_pos, cache)
        x = x + self.temporal_post_norm(y)
        y = self.mlp_block(self.channel_pre_norm(x))
        return x + self.channel_post_norm(y), new_cache if return_cache else None
