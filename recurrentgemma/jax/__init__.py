"""RecurrentGemma in JAX and Flax."""

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

if not (is_installed("jax") and is_installed("flax")):
    raise MissingFrameworkError("recurrentgemma.jax", "jax", "'recurrentgemma[jax]'")

from recurrentgemma.jax.checkpoint import (
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_parameters,
)
from recurrentgemma.jax.griffin import Griffin
from recurrentgemma.jax.layers import BlockDiagonalLinear, Conv1D, RMSNorm
from recurrentgemma.jax.lora import load_adapters
from recurrentgemma.jax.loss import cross_entropy
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.modules import (
    AttentionBlockCache,
    LocalAttentionBlock,
    MLPBlock,
    RecurrentBlock,
    RecurrentBlockCache,
    ResidualBlock,
    ResidualBlockCache,
)
from recurrentgemma.jax.rg_lru import RGLRU
from recurrentgemma.jax.runtime.params import init_params
from recurrentgemma.jax.sampler import Sampler, SamplerOutput
from recurrentgemma.jax.sampling import Categorical, Greedy
from recurrentgemma.jax.scan import choose_implementation, linear_scan, rg_lru_scan
from recurrentgemma.jax.sharding import ShardingSpec, make_mesh
from recurrentgemma_conversion.opening import load_tokenizer

if TYPE_CHECKING:
    from recurrentgemma.jax.training import (
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
    "ShardingSpec",
    "State",
    "TemporalBlockType",
    "TrainState",
    "choose_implementation",
    "config_from_preset",
    "create_train_state",
    "cross_entropy",
    "evaluate",
    "init_params",
    "layout_of",
    "linear_scan",
    "load_adapters",
    "load_checkpoint",
    "load_parameters",
    "load_state",
    "load_state_arrays",
    "load_tokenizer",
    "loss_fn",
    "make_mesh",
    "parameters",
    "rg_lru_scan",
    "save_adapters",
    "save_checkpoint",
    "save_parameters",
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
