"""Training in either framework, as `common.training.run` asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurrentgemma.cli.frameworks import DType, Framework, default_dtype
from recurrentgemma.common.twin import find_twin

if TYPE_CHECKING:
    import numpy as np

    from recurrentgemma.common.model.griffin import GriffinConfig
    from recurrentgemma.common.tokenizer import Tokenizer
    from recurrentgemma.common.training.batch import Batch
    from recurrentgemma.common.training.lora import LoraOptions
    from recurrentgemma.common.training.optimization import OptimizerOptions


class Setup(NamedTuple):
    """What to train, and how.

    Attributes:
      checkpoint: The weights to begin with; the bundled model's if None.
      config: The config of a model that begins at random; the checkpoint's model if None.
      tokenizer: The model's tokenizer.
      dtype: The dtype of the parameters.
      gradient_checkpointing: Whether the backward pass computes each block again.
      optimizer: How to optimise.
      lora: Which adapters to train, if any.
      state_dtype: The dtype of the optimiser's state.
      seed: The seed of everything that begins at random.
    """

    checkpoint: Path | None
    config: GriffinConfig | None
    tokenizer: Tokenizer
    dtype: DType
    gradient_checkpointing: bool
    optimizer: OptimizerOptions
    lora: LoraOptions | None
    state_dtype: DType
    seed: int


def training_dtype(framework: Framework) -> DType:
    """The dtype to train parameters in unless another is asked for."""
    return default_dtype(find_twin(framework).default_device())


class TwinTrainer:
    """A model of a twin in training, on an accelerator if there is one; a `run.Trainer`."""

    def __init__(self, framework: Framework, setup: Setup) -> None:
        from recurrentgemma.common.io.arrays import DTYPES
        from recurrentgemma.common.model.layer_spec import num_parameters

        self._twin, self._tokenizer = find_twin(framework), setup.tokenizer
        device = self._twin.default_device()
        if setup.config is None:
            model = self._twin.load(setup.checkpoint, setup.dtype, device)
        else:
            model = self._twin.init(setup.config, setup.seed, setup.dtype, device)
        self._state = self._twin.train_state(
            model,
            gradient_checkpointing=setup.gradient_checkpointing,
            optimizer=setup.optimizer,
            lora=setup.lora,
            state_dtype=setup.state_dtype,
            seed=setup.seed,
        )
        self.model_size = num_parameters(model.config) * DTYPES[setup.dtype].itemsize

    @property
    def step(self) -> int:
        return int(self._state.step)

    def train_step(self, batches: Sequence[Batch]) -> Mapping[str, Any]:
        self._state, metrics = self._twin.training.train_step(self._state, batches)
        return metrics

    def evaluate(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        return self._twin.training.evaluate(self._state, batches)

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = self._twin.training.state_arrays(self._state)
        del arrays["step"]
        return arrays

    def load(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        arrays = {"step": np.asarray(step), **arrays}
        self._state = self._twin.training.load_state_arrays(self._state, arrays)

    def save(self, path: Path, adapters: Path) -> None:
        model = self._twin.trained(self._state)
        self._twin.save(path, model, self._tokenizer, force=True)
        if self._state.lora is not None:
            self._twin.training.save_adapters(adapters, self._state, force=True)

    def sample(self, prompts: Sequence[str], tokens: int) -> list[str]:
        sampler = self._twin.sampler(self._twin.trained(self._state), self._tokenizer)
        end = self._tokenizer.end_of_turn_id
        return sampler(prompts, tokens, stop_ids=[] if end is None else [end]).text

    def memory(self) -> int | None:
        return self._twin.memory()
