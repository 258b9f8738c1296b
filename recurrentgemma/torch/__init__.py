"""RecurrentGemma in PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from recurrentgemma.common.errors import MissingFrameworkError
from recurrentgemma.common.extras import is_installed
from recurrentgemma.common.generation.conversation import Conversation
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType
from recurrentgemma.common.model.state import State
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.common.training.optimization import OptimizerOptions

if not is_installed("torch"):
    raise MissingFrameworkError("recurrentgemma.torch", "torch", "'recurrentgemma[torch]'")

from recurrentgemma.torch.checkpoint import load_checkpoint, save_checkpoint
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma.torch.layers import BlockDiagonalLinear, Conv1D, RMSNorm
from recurrentgemma.torch.lora import load_adapters
from recurrentgemma.torch.loss import cross_entropy
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.modules import (
    AttentionBlockCache,
    LocalAttentionBlock,
    MLPBlock,
    RecurrentBlock,
    RecurrentBlockCache,
    ResidualBlock,
    ResidualBlockCache,
)
from recurrentgemma.torch.rg_lru import RGLRU
from recurrentgemma.torch.sampler import Sampler, SamplerOutput
from recurrentgemma.torch.sampling import Categorical, Greedy
from recurrentgemma.torch.scan import choose_implementation, linear_scan, rg_lru_scan, rnn_scan
from recurrentgemma.torch.sharding import make_mesh
from recurrentgemma_conversion.opening import load_tokenizer

if TYPE_CHECKING:
    from recurrentgemma.torch.training import (
        TrainState,
        create_train_state,
        evaluate,
        layout_of,
        load_state,
        load_state_arrays,
        loss_fn,
        parameters,
        save_adapters,
        save_state,
        state_arrays,
        train_step,
    )

__all__ = [
    "RGLRU",
    "AttentionBlockCache",
    "Batch",
    "BlockDiagonalLinear",
    "Categorical",
    "Conv1D",
    "Conversation",
    "GemmaConfig",
    "Greedy",
    "Griffin",
    "GriffinConfig",
    "LocalAttentionBlock",
    "LoraOptions",
    "MLPBlock",
    "Model",
    "OptimizerOptions",
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
    "TrainState",
    "choose_implementation",
    "config_from_preset",
    "create_train_state",
    "cross_entropy",
    "evaluate",
    "layout_of",
    "linear_scan",
    "load_adapters",
    "load_checkpoint",
    "load_state",
    "load_state_arrays",
    "load_tokenizer",
    "loss_fn",
    "make_mesh",
    "parameters",
    "rg_lru_scan",
    "rnn_scan",
    "save_adapters",
    "save_checkpoint",
    "save_state",
    "state_arrays",
    "train_step",
]


def __getattr__(name: str) -> Any:
    """The names of training, imported when they are first used: sampling needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.training"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
