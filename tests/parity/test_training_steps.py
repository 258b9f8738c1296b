"""Ten steps of training from the same weights and batches give the same losses and weights.

In float64, only a difference in the twins' arithmetic can move them apart. PyTorch uses its own
optimizers, JAX those of optax.
"""

from typing import Any

import numpy as np
import pytest
from cases import CONFIGS, make_batch, make_params, next_token_loss
from sweeps import sweep

from backends import BACKENDS, Backend
from recurrentgemma.common.model.layer_spec import layer_spec
from tolerances import assert_close

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")
pytest.importorskip("optax", reason="optax is not installed")

import jax
import optax
import torch

STEPS = 10
CONFIG = CONFIGS["griffin"]
# Epsilon and weight decay are large, so that each has an effect.
EPS, WEIGHT_DECAY = 1e-4, 0.1


class Optax:
    """optax's optimizer on a flat mapping of parameters."""

    def __init__(self, name: str, params: dict[str, np.ndarray]) -> None:
        self.params = dict(params)
        make = {
            "sgd": lambda: optax.sgd(0.1),
            "adamw": lambda: optax.adamw(1e-2, eps=EPS, weight_decay=WEIGHT_DECAY),
        }
        self.optimizer = make[name]()
        with jax.enable_x64(True):
            self.state = jax.jit(self.optimizer.init)(self.params)
        self.update = jax.jit(self._update)

    def _update(self, grads: Any, state: Any, params: Any) -> Any:
        updates, state = self.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(self, grads: dict[str, np.ndarray]) -> None:
        with jax.enable_x64(True):
            updated, self.state = self.update(grads, self.state, self.params)
        self.params = {path: np.asarray(value) for path, value in updated.items()}


class Torch:
    """PyTorch's optimizer on a flat mapping of parameters."""

    def __init__(self, name: str, params: dict[str, np.ndarray]) -> None:
        self.tensors = {
            path: torch.tensor(value).requires_grad_() for path, value in params.items()
        }
        if name == "sgd":
            self.optimizer = torch.optim.SGD(self.tensors.values(), lr=0.1)
        else:
            self.optimizer = torch.optim.AdamW(
                self.tensors.values(), lr=1e-2, eps=EPS, weight_decay=WEIGHT_DECAY
            )

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {path: value.detach().numpy().copy() for path, value in self.tensors.items()}

    def step(self, grads: dict[str, np.ndarray]) -> None:
        for path, value in self.tensors.items():
            value.grad = torch.tensor(np.ascontiguousarray(grads[path]))
        self.optimizer.step()


OPTIMIZERS = {"jax": Optax, "torch": Torch}


def train(backend: Backend, name: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of each step, and the weights after the last."""
    optimizer = OPTIMIZERS[backend.name](name, dict(make_params(CONFIG)))
    losses = []
    for step in range(STEPS):
        _, segment_pos = make_batch(CONFIG, 24)
        rng = np.random.default_rng(step)
        tokens = rng.integers(CONFIG.vocab_size, size=segment_pos.shape, dtype=np.int32)
        tokens[:, ::2] = step % 2  # something to learn
        mask = (segment_pos[:, 1:] > 0).astype(np.float64)
        checkpointing = sweep(False, step % 2 == 1)
        network = backend.griffin(CONFIG, optimizer.params, gradient_checkpointing=checkpointing)
        logits, state = network(tokens, segment_pos)
        loss, dlogits = next_token_loss(logits, tokens, mask)
        dlogits = np.where((segment_pos >= 0)[..., None], dlogits, 0.0)
        zeros = {
            block: {field: np.zeros_like(value) for field, value in fields.items()}
            for block, fields in state.items()
        }
        optimizer.step(network.grads(tokens, segment_pos, dy=dlogits, dstate=zeros)["params"])
        losses.append(loss)
    return losses, optimizer.params


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_ten_steps(name: str) -> None:
    (one, weights), (other, other_weights) = (train(BACKENDS[twin], name) for twin in OPTIMIZERS)
    assert one[-1] < one[0] - 0.3, "nothing was learnt"
    np.testing.assert_allclose(one, other, rtol=1e-10)
    assert set(weights) == set(other_weights) == {spec.path for spec in layer_spec(CONFIG)}
    for path, value in weights.items():
        assert (value != make_params(CONFIG)[path]).any(), f"{path} was not trained"
        assert_close(value, other_weights[path], "output", "float64", name=path)
