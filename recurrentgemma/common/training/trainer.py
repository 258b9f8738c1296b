"""A model in training, in either framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import num_parameters
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions, num_trainable
from recurrentgemma.common.training.optimization import OptimizerOptions
from recurrentgemma.common.twin import Twin


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
      mesh: The mesh of the twin over which the model is split, if any.
    """

    checkpoint: Path | None
    config: Config | None
    tokenizer: Tokenizer
    dtype: str
    gradient_checkpointing: bool
    optimizer: OptimizerOptions
    lora: LoraOptions | None
    state_dtype: str
    seed: int
    mesh: Any = None


class Trainer:
    """A model of a twin in training, on an accelerator if there is one.

    Attributes:
      step: The number of steps done.
      num_trainable: The number of values that training changes.
      num_parameters: The number of all values, with those of adapters.
      model_size: The model's size in bytes.
    """

    def __init__(self, twin: Twin, setup: Setup) -> None:
        self._twin, self._tokenizer = twin, setup.tokenizer
        if setup.mesh is None:
            where: dict[str, Any] = {"device": twin.default_device()}
        else:
            where = {"mesh": setup.mesh}
        if setup.config is None:
            model = twin.load(setup.checkpoint, setup.dtype, **where)
        else:
            model = twin.init(setup.config, setup.seed, setup.dtype, **where)
        self._state = twin.train_state(
            model,
            gradient_checkpointing=setup.gradient_checkpointing,
            optimizer=setup.optimizer,
            lora=setup.lora,
            state_dtype=setup.state_dtype,
            seed=setup.seed,
        )
        of_model = num_parameters(model.config)
        self.num_trainable = num_trainable(model.config, setup.lora)
        self.num_parameters = of_model + (self.num_trainable if setup.lora else 0)
        self.model_size = of_model * DTYPES[setup.dtype].itemsize

    @property
    def step(self) -> int:
        return int(self._state.step)

    def train_step(self, batches: Sequence[Batch]) -> Mapping[str, Any]:
        """One update; returns "loss", "tokens", "grad_norm" and "learning_rate"."""
        self._state, metrics = self._twin.training.train_step(self._state, batches)
        return metrics

    def evaluate(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """The "loss", "perplexity" and "tokens" of all batches."""
        return self._twin.training.evaluate(self._state, batches)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that training changes, except the number of steps."""
        arrays = self._twin.training.state_arrays(self._state)
        del arrays["step"]
        return arrays

    def write_state(self, folder: Path) -> None:
        """Writes everything that training changes into a folder, from all processes together."""
        self._twin.training.write_state(folder, self._state)

    def load(self, step: int, arrays: Mapping[str, np.ndarray] | Path) -> None:
        """Restores the arrays that `arrays` returned at a step, or those in a folder."""
        if isinstance(arrays, Path):
            self._state = self._twin.training.load_state(arrays, self._state)
            return
        arrays = {"step": np.asarray(step), **arrays}
        self._state = self._twin.training.load_state_arrays(self._state, arrays)

    def save(self, path: Path, adapters: Path) -> None:
        """Writes the model as a checkpoint folder, and its adapters, if any, as a file."""
        model = self._twin.trained(self._state)
        self._twin.save(path, model, self._tokenizer, force=True)
        if self._state.lora is not None:
            self._twin.training.save_adapters(adapters, self._state, force=True)

    def sample(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy continuations of at most so many tokens."""
        sampler = self._twin.sampler(self._twin.trained(self._state), self._tokenizer)
        end = self._tokenizer.end_of_turn_id
        return sampler(prompts, tokens, stop_ids=[] if end is None else [end]).text

    def memory(self) -> int | None:
        """The most bytes used so far, where that is known."""
        return self._twin.memory()
