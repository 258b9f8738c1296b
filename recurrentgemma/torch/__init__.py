"""RecurrentGemma in PyTorch."""

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.conversation import Conversation
from recurrentgemma.common.errors import MissingFrameworkError
from recurrentgemma.common.extras import is_installed
from recurrentgemma.common.presets import Preset, ScanType, TemporalBlockType
from recurrentgemma.common.state import State

if not is_installed("torch"):
    raise MissingFrameworkError("recurrentgemma.torch", "torch", "'recurrentgemma[torch]'")

from recurrentgemma.torch.attention import LocalAttentionBlock
from recurrentgemma.torch.blocks import MLPBlock, RecurrentBlock, ResidualBlock
from recurrentgemma.torch.cache import AttentionBlockCache, RecurrentBlockCache, ResidualBlockCache
from recurrentgemma.torch.checkpoint import load_checkpoint, save_checkpoint
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma.torch.layers import BlockDiagonalLinear, Conv1D, RMSNorm
from recurrentgemma.torch.rg_lru import RGLRU
from recurrentgemma.torch.sampler import Sampler, SamplerOutput
from recurrentgemma.torch.sampling import Categorical, Greedy
from recurrentgemma.torch.scan import choose_implementation, linear_scan, rg_lru_scan
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
    "State",
    "TemporalBlockType",
    "choose_implementation",
    "linear_scan",
    "load_checkpoint",
    "load_tokenizer",
    "rg_lru_scan",
    "save_checkpoint",
]
