"""RecurrentGemma in JAX and Flax."""

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.conversation import Conversation
from recurrentgemma.common.errors import MissingFrameworkError
from recurrentgemma.common.extras import is_installed
from recurrentgemma.common.presets import Preset, ScanType, TemporalBlockType
from recurrentgemma.common.state import State

if not (is_installed("jax") and is_installed("flax")):
    raise MissingFrameworkError("recurrentgemma.jax", "jax", "'recurrentgemma[jax]'")

from recurrentgemma.jax.attention import LocalAttentionBlock
from recurrentgemma.jax.blocks import MLPBlock, RecurrentBlock, ResidualBlock
from recurrentgemma.jax.cache import AttentionBlockCache, RecurrentBlockCache, ResidualBlockCache
from recurrentgemma.jax.checkpoint import (
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_parameters,
)
from recurrentgemma.jax.griffin import Griffin, init_params
from recurrentgemma.jax.layers import BlockDiagonalLinear, Conv1D, RMSNorm
from recurrentgemma.jax.rg_lru import RGLRU
from recurrentgemma.jax.sampler import Sampler, SamplerOutput
from recurrentgemma.jax.sampling import Categorical, Greedy
from recurrentgemma.jax.scan import choose_implementation, linear_scan, rg_lru_scan
from recurrentgemma.jax.sharding import ShardingSpec
from recurrentgemma_conversion.opening import load_tokenizer

__all__ = [
    "RGLRU",
    "AttentionBlockCache",
    "BlockDiagonalLinear",
    "Categorical",
    "Conv1D",
    "Conversation",
    "Greedy",
    "Griffin",
    "GriffinConfig",
    "LocalAttentionBlock",
    "MLPBlock",
    "Preset",
    "RMSNorm",
    "RecurrentBlock",
    "RecurrentBlockCache",
    "ResidualBlock",
    "ResidualBlockCache",
    "Sampler",
    "SamplerOutput",
    "ScanType",
    "ShardingSpec",
    "State",
    "TemporalBlockType",
    "choose_implementation",
    "init_params",
    "linear_scan",
    "load_checkpoint",
    "load_parameters",
    "load_tokenizer",
    "rg_lru_scan",
    "save_checkpoint",
    "save_parameters",
]
