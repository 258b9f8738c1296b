"""One adapter per twin for training: the same calls over NumPy and the layer spec's paths."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cases import make_tokens, positions

from backends import BACKENDS, Backend
from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.common.training.optimization import OptimizerOptions

Params = Mapping[str, np.ndarray]


def make_batch(config: GriffinConfig, seed: int, rows: int = 3, length: int = 17) -> Batch:
    """Rows of one document, of three, and of one behind padding, over and over.

    Targets are a function of the tokens, so that there is something to learn; what follows a
    document's last token, padding and some others have no weight.
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

    @abc.abstractmethod
    def state(
        self,
        config: GriffinConfig,
        params: Params,
        *,
        dtype: str = "float32",
        state_dtype: str = "float32",
        gradient_checkpointing: bool = True,
        optimizer: OptimizerOptions | None = None,
        lora: LoraOptions | None = None,
    ) -> Any:
        """A training state of a model with these parameters."""

    @abc.abstractmethod
    def parameters(self, state: Any) -> dict[str, np.ndarray]:
        """What `parameters` gives, as float64 by path."""

    @abc.abstractmethod
    def logits(self, state: Any, batch: Batch) -> np.ndarray:
        """Of the model as it is in training, adapters beside the base."""

    @abc.abstractmethod
    def cross_entropy(
        self, hidden, embedding, targets, weights, dtype: str, **kwargs: Any
    ) -> tuple[float, tuple[np.ndarray, ...]]:
        """The loss, and its gradients for `hidden`, `embedding` and `weights`."""

    @abc.abstractmethod
    def cross_entropy_second(
        self, hidden, embedding, targets, weights, directions, **kwargs: Any
    ) -> tuple[np.ndarray, ...]:
        """Gradients of the sum over all of `directions` times those of the loss, in float64."""

    def steps(
        self, state: Any, batches: Sequence[Batch | Sequence[Batch]]
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """The state after a step on each batch, and each metric by step."""
        metrics = []
        for batch in batches:
            state, step_metrics = self.module.train_step(state, batch)
            metrics.append({name: float(value) for name, value in step_metrics.items()})
        return state, {name: np.array([m[name] for m in metrics]) for name in metrics[0]}


class JaxTrainer(Trainer):
    def state(
        self,
        config,
        params,
        *,
        dtype="float32",
        state_dtype="float32",
        gradient_checkpointing=True,
        optimizer=None,
        lora=None,
    ):
        model = self.module.Griffin(config, gradient_checkpointing, param_dtype=dtype)
        tree = self.backend._tree(params, dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return self.module.create_train_state(
            model, tree, optimizer=optimizer, lora=lora, state_dtype=state_dtype
        )

    def parameters(self, state):
        griffin = importlib.import_module("recurrentgemma.jax.griffin")
        tree = self.module.parameters(state)
        return {
            spec.path: self.backend.to_numpy(griffin.get_path(tree, spec.path))
            for spec in layer_spec(state.model.config)
        }

    def logits(self, state, batch):
        import jax

        from recurrentgemma.jax.lora import adapted

        @jax.jit
        def apply(parameters, base):
            with adapted(parameters, state.lora):
                return state.model.apply({"params": base}, batch.tokens, batch.segment_pos)[0]

        return self.backend.to_numpy(apply(state.parameters, state.base))

    def cross_entropy(self, hidden, embedding, targets, weights, dtype, **kwargs):
        import jax

        with self.precision(dtype):
            args = [self.backend.array(z, dtype) for z in (hidden, embedding, weights)]
            labels = self.backend.array(targets, "int32")

            def loss(hidden, embedding, weights):
                return self.module.cross_entropy(hidden, embedding, labels, weights, **kwargs)

            value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*args)
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

            def loss(hidden, embedding, weights):
                return self.module.cross_entropy(hidden, embedding, labels, weights, **kwargs)

            _, pullback = jax.vjp(jax.grad(loss, (0, 1, 2)), *args)
            return self.backend.to_numpy(pullback(moves))


class TorchTrainer(Trainer):
    def state(
        self,
        config,
        params,
        *,
        dtype="float32",
        state_dtype="float32",
        gradient_checkpointing=True,
        optimizer=None,
        lora=None,
    ):
        import torch

        model = self.module.Griffin(config, gradient_checkpointing, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for spec in layer_spec(config):
                value = torch.tensor(np.ascontiguousarray(to_torch(spec.path, params[spec.path])))
                model.get_parameter(torch_name(spec.path)).copy_(value)
        return self.module.create_train_state(
            model, optimizer=optimizer, lora=lora, state_dtype=getattr(torch, state_dtype)
        )

    def parameters(self, state):
        model = self.module.parameters(state)
        assert type(model) is self.module.Griffin
        return {
            spec.path: to_torch(
                spec.path, self.backend.to_numpy(model.get_parameter(torch_name(spec.path)))
            )
            for spec in layer_spec(model.config)
        }

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
