"""Training in either framework, as `common.run` wants it: neither is imported before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurrentgemma.cli.frameworks import DType, Framework, default_dtype

if TYPE_CHECKING:
    import numpy as np

    from recurrentgemma.common.model.griffin import GriffinConfig
    from recurrentgemma.common.tokenizer import Tokenizer
    from recurrentgemma.common.training.batch import Batch
    from recurrentgemma.common.training.lora import LoraOptions
    from recurrentgemma.common.training.optimization import OptimizerOptions
    from recurrentgemma.common.training.run import Trainer


class Setup(NamedTuple):
    """What is trained, and how.

    Attributes:
      checkpoint: The weights to begin with; the bundled model's if None.
      config: Of a model to begin at random; that of the checkpoint's weights if None.
      tokenizer: The model's.
      dtype: Of the parameters.
      gradient_checkpointing: Whether blocks are computed again in the backward pass.
      optimizer: How to optimise.
      lora: Which adapters to train, if any.
      state_dtype: Of the optimiser's state.
      seed: Of what begins at random.
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


def make_trainer(framework: Framework, setup: Setup) -> Trainer:
    """The model in training."""
    return TorchTrainer(setup) if framework is Framework.TORCH else JaxTrainer(setup)


def training_dtype(framework: Framework) -> DType:
    """What parameters are trained in where nothing else is asked for."""
    if framework is Framework.TORCH:
        return default_dtype(_torch_device())
    import jax

    return default_dtype(jax.default_backend())


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Trainer:
    """What both have."""

    def __init__(self, training: Any, tokenizer: Tokenizer, state: Any, config: Any) -> None:
        from recurrentgemma.common.io.arrays import DTYPES
        from recurrentgemma.common.model.layer_spec import num_parameters

        self._training, self._tokenizer, self._state = training, tokenizer, state
        dtype = str(state.dtype).removeprefix("torch.")
        self.model_size = num_parameters(config) * DTYPES[dtype].itemsize

    @property
    def step(self) -> int:
        return int(self._state.step)

    def train_step(self, batches: Sequence[Batch]) -> Mapping[str, Any]:
        self._state, metrics = self._training.train_step(self._state, batches)
        return metrics

    def evaluate(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        return self._training.evaluate(self._state, batches)

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = self._training.state_arrays(self._state)
        del arrays["step"]
        return arrays

    def load(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        arrays = {"step": np.asarray(step), **arrays}
        self._state = self._training.load_state_arrays(self._state, arrays)

    def _save_adapters(self, path: Path) -> None:
        if self._state.lora is not None:
            self._training.save_adapters(path, self._state, force=True)

    def _texts(self, sampler: Any, prompts: Sequence[str], tokens: int) -> list[str]:
        end = self._tokenizer.end_of_turn_id
        return sampler(prompts, tokens, stop_ids=[] if end is None else [end]).text


class TorchTrainer(_Trainer):
    """PyTorch; on a GPU if there is one."""

    def __init__(self, setup: Setup) -> None:
        import torch

        from recurrentgemma.torch import Griffin, load_checkpoint, training

        device, dtype = _torch_device(), getattr(torch, setup.dtype)
        if setup.config is None:
            model = load_checkpoint(setup.checkpoint, dtype=dtype, device=device)
        else:
            model = Griffin(setup.config, device=device, dtype=dtype)
            model.reset_parameters(seed=setup.seed)
        model.gradient_checkpointing = setup.gradient_checkpointing
        state = training.create_train_state(
            model,
            optimizer=setup.optimizer,
            lora=setup.lora,
            state_dtype=getattr(torch, setup.state_dtype),
            seed=setup.seed,
        )
        super().__init__(training, setup.tokenizer, state, model.config)

    def save(self, path: Path, adapters: Path) -> None:
        from recurrentgemma.torch import save_checkpoint

        model = self._training.parameters(self._state)
        save_checkpoint(path, model, self._tokenizer, force=True)
        self._save_adapters(adapters)

    def sample(self, prompts: Sequence[str], tokens: int) -> list[str]:
        from recurrentgemma.torch import Sampler

        sampler = Sampler(self._training.parameters(self._state), self._tokenizer)
        return self._texts(sampler, prompts, tokens)

    def memory(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_memory()


class JaxTrainer(_Trainer):
    """JAX; on an accelerator if there is one."""

    def __init__(self, setup: Setup) -> None:
        import jax

        from recurrentgemma.jax import Griffin, init_params, load_checkpoint, training

        dtype = jax.numpy.dtype(setup.dtype)
        if setup.config is None:
            model, params = load_checkpoint(setup.checkpoint, dtype=dtype)
        else:
            model = Griffin(setup.config, param_dtype=dtype)
            params = init_params(setup.config, setup.seed, dtype)
        model = model.clone(gradient_checkpointing=setup.gradient_checkpointing)
        state = training.create_train_state(
            model,
            params,
            optimizer=setup.optimizer,
            lora=setup.lora,
            state_dtype=jax.numpy.dtype(setup.state_dtype),
            seed=setup.seed,
        )
        super().__init__(training, setup.tokenizer, state, model.config)

    def save(self, path: Path, adapters: Path) -> None:
        from recurrentgemma.jax import save_checkpoint

        params = self._training.parameters(self._state)
        save_checkpoint(path, self._state.model.config, params, self._tokenizer, force=True)
        self._save_adapters(adapters)

    def sample(self, prompts: Sequence[str], tokens: int) -> list[str]:
        from recurrentgemma.jax import Sampler

        params = self._training.parameters(self._state)
        sampler = Sampler(self._state.model, self._tokenizer, params)
        return self._texts(sampler, prompts, tokens)

    def memory(self) -> int | None:
        import jax

        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else process_memory()


def process_memory() -> int | None:
    """Bytes of memory that this process held at most, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
