"""The blocks of a Griffin model: recurrent, MLP, and the residual block around them."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import gelu

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.torch.attention import LocalAttentionBlock
from recurrentgemma.torch.cache import RecurrentBlockCache, ResidualBlockCache
from recurrentgemma.torch.layers import Conv1D, Einsum, RMSNorm, SpecModule
from recurrentgemma.torch.rg_lru import RGLRU


class RecurrentBlock(SpecModule):
    """y = (gelu(x W_y) * RGLRU(conv(x W_x))) W_out."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        kwargs = {"device": device, "dtype": dtype}
        self.linear_y = self.linear("linear_y", device, dtype)
        self.linear_x = self.linear("linear_x", device, dtype)
        self.conv_1d = Conv1D(config, f"{prefix}.conv_1d", **kwargs)
        self.rg_lru = RGLRU(config, f"{prefix}.rg_lru", **kwargs)
        self.linear_out = self.linear("linear_out", device, dtype)
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        segment_pos: Int[Tensor, "b t"],
        cache: RecurrentBlockCache | None = None,
    ) -> tuple[Float[Tensor, "b t d"], RecurrentBlockCache]:
        """Returns the outputs and the state after them."""
        rg_lru_state, conv1d_state = (None, None) if cache is None else cache
        y = gelu(self.linear_y(x), approximate="tanh")
        x = self.linear_x(x)
        x, conv1d_state = self.conv_1d(x, segment_pos, conv1d_state)
        x, rg_lru_state = self.rg_lru(x, segment_pos, rg_lru_state)
        return self.linear_out(x * y), RecurrentBlockCache(rg_lru_state, conv1d_state)


class MLPBlock(SpecModule):
    """y = (gelu(x W_0 + b_0) * (x W_1 + b_1)) W_down + b_down."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.ffw_up = Einsum(config, f"{prefix}.ffw_up", device=device, dtype=dtype)
        self.ffw_down = self.linear("ffw_down", device, dtype)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate, value = self.ffw_up(x)
        return self.ffw_down(gelu(gate, approximate="tanh") * value)


TEMPORAL_BLOCKS = {
    TemporalBlockType.RECURRENT: ("recurrent_block", RecurrentBlock),
    TemporalBlockType.ATTENTION: ("attention_block", LocalAttentionBlock),
}


class ResidualBlock(SpecModule):
    """x + temporal(norm(x)), then x + mlp(norm(x)); its prefix is "blocks.N"."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        kwargs = {"device": device, "dtype": dtype}
        index = int(prefix.removeprefix("blocks."))
        self.temporal_name, block = TEMPORAL_BLOCKS[config.block_types[index]]
        self.temporal_pre_norm = RMSNorm(config, f"{prefix}.temporal_pre_norm", **kwargs)
        temporal_block = block(config, f"{prefix}.{self.temporal_name}", **kwargs)
        self.add_module(self.temporal_name, temporal_block)
        self.channel_pre_norm = RMSNorm(config, f"{prefix}.channel_pre_norm", **kwargs)
        self.mlp_block = MLPBlock(config, f"{prefix}.mlp_block", **kwargs)
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        segment_pos: Int[Tensor, "b t"],
        cache: ResidualBlockCache | None = None,
    ) -> tuple[Float[Tensor, "b t d"], ResidualBlockCache]:
        """Returns the outputs and the state after them."""
        temporal_block = self.get_submodule(self.temporal_name)
        y, new_cache = temporal_block(self.temporal_pre_norm(x), segment_pos, cache)
        x = x + y
        return x + self.mlp_block(self.channel_pre_norm(x)), new_cache
