"""Training in both twins: the same calls over NumPy and the layer spec's paths."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cases import make_tokens, positions

from backends import BACKENDS, Backend
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions

Params = Mapping[str, np.ndarray]


def make_batch(config: Config, seed: int, rows: int = 3, length: int = 17) -> Batch:
    """Rows of one document, of three, and of one after padding, in turn.

    Targets are a function of the tokens, so that there is something to learn. Padding, each
    document's last token and some others have no weight.
    """
    rng = np.random.default_rng(seed)
    tokens = make_tokens(config, rows, length, seed=seed)
    third = length // 3
    kinds = (
        positions([length]),
        positions([third, third, length - 2 * third]),
        positions([length - third], third),
    )
    segment_pos = np.array([kinds[row % 3] for row in range(rows)], np.int32)
    ends = np.concatenate([segment_pos[:, 1:] == 0, np.ones((rows, 1), bool)], 1)
    counted = (segment_pos >= 0) & ~ends & (rng.random(tokens.shape) < 0.8)
    targets = (3 * tokens + 1) % config.vocab_size
    targets = np.where(counted, targets, -100).astype(np.int32)
    return Batch(tokens, segment_pos, targets, counted.astype(np.float32))


class Trainer(abc.ABC):
    """A twin's training."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name = backend.name
        self.precision = backend.precision

    @property
    def module(self) -> Any:
        """The twin."""
        return self.backend.module

    def state(
        self,
        config: GriffinConfig,
        params: Params,
        *,
        dtype: str = "float32",
        state_dtype: str = "float32",
        gradient_checkpointing: bool = True,
        optimizer: Any = None,
        lora: LoraOptions | None = None,
    ) -> Any:
        """A training state of a model with these parameters."""
        return self.backend.twin.train_state(
            self.backend.twin.make(config, params.items(), dtype),
            gradient_checkpointing=gradient_checkpointing,
            state_dtype=state_dtype,
            optimizer=optimizer,
            lora=lora,
        )

    def parameters(self, state: Any) -> dict[str, np.ndarray]:
        """The parameters of the state's model, as float64 by path."""
        params = self.backend.twin.params(self.backend.twin.trained(state))
        return {path: value.astype(np.float64) for path, value in params.items()}

    @abc.abstractmethod
    def logits(self, state: Any, batch: Batch) -> np.ndarray:
        """The logits of the model in training, its adapters not merged."""

    @abc.abstractmethod
    def cross_entropy(
        self, hidden, embedding, targets, weights, dtype: str, **kwargs: Any
    ) -> tuple[float, tuple[np.ndarray, ...]]:
        """The loss, and its gradients for `hidden`, `embedding` and `weights`."""

    @abc.abstractmethod
    def cross_entropy_second(
        self, hidden, embedding, targets, weights, directions, **kwargs: Any
    ) -> tuple[np.ndarray, ...]:
        """Gradients of the sum of `directions` times the loss's gradients, in float64."""

    def steps(
        self, state: Any, batches: Sequence[Batch | Sequence[Batch]]
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """The state after a step on each batch, and each metric by step."""
        metrics = []
        for batch in batches:
            state, step_metrics = self.module.train_step(state, batch)
            metrics.append({name: float(value) for name, value in step_metrics.items()})
        return state, {name: np.array([m[name] for m in metrics]) for name in metrics[0]}


@functools.cache
def _loss_gradients(**kwargs: Any) -> Callable[..., Any]:
    """JAX's loss and its gradients: of hidden states, embedding, weights, then labels."""
    import jax

    from recurrentgemma.jax import cross_entropy

    def loss(hidden, embedding, weights, labels):
        return cross_entropy(hidden, embedding, labels, weights, **kwargs)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


class JaxTrainer(Trainer):
    def logits(self, state, batch):
        import jax

        from recurrentgemma.jax.lora import adapted

        @jax.jit
        def apply(parameters, base):
            params = adapted(state.model.config, base, parameters, state.lora)
            return state.model.apply({"params": params}, batch.tokens, batch.segment_pos)[0]

        return self.backend.to_numpy(apply(state.parameters, state.base))

    def cross_entropy(self, hidden, embedding, targets, weights, dtype, **kwargs):
        with self.precision(dtype):
            args = [self.backend.array(z, dtype) for z in (hidden, embedding, weights)]
            labels = self.backend.array(targets, "int32")
            value, gradients = _loss_gradients(**kwargs)(*args, labels)
            assert [g.dtype for g in gradients] == [a.dtype for a in args]
            return float(value), tuple(map(self.backend.to_numpy, gradients))

    def cross_entropy_second(self, hidden, embedding, targets, weights, directions, **kwargs):
        import jax

        with self.precision("float64"):
            args, moves = (
                tuple(self.backend.array(z, "float64") for z in part)
                for part in ((hidden, embedding, weights), directions)
            )
            labels = self.backend.array(targets, "int32")

            @jax.jit
            def second(args, moves):
                return jax.vjp(lambda *z: _loss_gradients(**kwargs)(*z, labels)[1], *args)[1](moves)

            return self.backend.to_numpy(second(args, moves))


class TorchTrainer(Trainer):
    def logits(self, state, batch):
        return self.backend.to_numpy(state.model(batch.tokens, batch.segment_pos)[0])

    def cross_entropy(self, hidden, embedding, targets, weights, dtype, **kwargs):
        args = [self.backend.array(z, dtype).requires_grad_() for z in (hidden, embedding, weights)]
        hidden, embedding, weights = args
        labels = self.backend.array(targets, "int32")
        loss = self.module.cross_entropy(hidden, embedding, labels, weights, **kwargs)
        loss.backward()
        assert [z.grad.dtype for z in args] == [z.dtype for z in args]
        return float(loss.detach()), tuple(self.backend.to_numpy(z.grad) for z in args)

    def cross_entropy_second(self, hidden, embedding, targets, weights, directions, **kwargs):
        import torch

        args, moves = (
            tuple(self.backend.array(z, "float64") for z in part)
            for part in ((hidden, embedding, weights), directions)
        )
        hidden, embedding, weights = (z.requires_grad_() for z in args)
        labels = self.backend.array(targets, "int32")
        loss = self.module.cross_entropy(hidden, embedding, labels, weights, **kwargs)
        gradients = torch.autograd.grad(loss, args, create_graph=True)
        return self.backend.to_numpy(torch.autograd.grad(gradients, args, moves))


TRAINERS: dict[str, Trainer] = {
    name: {"jax": JaxTrainer, "torch": TorchTrainer}[name](backend)
    for name, backend in BACKENDS.items()
}
