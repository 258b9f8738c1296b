"""A model in a framework, as the comparison sees it: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import abc
import functools
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import MissingExtraError
from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state import state_shapes
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides

Arrays = dict[str, np.ndarray]


class Outputs(NamedTuple):
    """What a forward pass gives.

    Attributes:
      activations: By name, [B, T, ...], the logits last.
      state: The framework's own.
    """

    activations: Arrays
    state: Any


class Model(abc.ABC):
    """A model in one dtype. Arrays have the dtypes that the framework computed.

    Attributes:
      config: What it is.
      widest: The widest dtype that all of its arithmetic follows.
      plain: Whether it reads documents only whole, one a row and without padding.
    """

    config: GriffinConfig
    widest = "float64"
    plain = False

    @abc.abstractmethod
    def cast(self, dtype: str) -> Model:
        """The same weights, cast."""

    @abc.abstractmethod
    def run(
        self, tokens: np.ndarray, segment_pos: np.ndarray, state: Any, names: tuple[str, ...]
    ) -> Outputs:
        """A forward pass from a state, None at the start."""

    @abc.abstractmethod
    def start(self, batch_size: int) -> Any:
        """The state before the first token."""

    @abc.abstractmethod
    def arrays_of(self, state: Any) -> Arrays:
        """A state's arrays, by "blocks.N.field"."""

    @abc.abstractmethod
    def parameters(self) -> Arrays:
        """Every parameter in the Flax layout, by path."""

    @abc.abstractmethod
    def gradients(self, tokens: np.ndarray, segment_pos: np.ndarray) -> Arrays:
        """Of the mean surprise of each document's tokens but its first, by path."""


class JaxModel(Model):
    """The JAX twin."""

    def __init__(self, model: Any, params: Mapping[str, Any]) -> None:
        self.config, self._model, self._params = model.config, model, params

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | None, dtype: str, overrides: Overrides = NO_OVERRIDES
    ) -> JaxModel:
        """From a checkpoint, or the bundled model if None."""
        from recurrentgemma.jax import load_checkpoint

        with _jax_precision(dtype):
            return cls(*load_checkpoint(path, dtype=dtype, overrides=overrides))

    @property
    def dtype(self) -> str:
        return str(np.dtype(self._model.param_dtype))

    def cast(self, dtype):
        import jax

        with _jax_precision(dtype):
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), self._params)
            return JaxModel(self._model.clone(param_dtype=np.dtype(dtype)), params)

    def run(self, tokens, segment_pos, state, names):
        with _jax_precision(self.dtype):
            found, logits, state = _jax_functions()[0](
                self._model, self._params, tokens, segment_pos, state, names=names
            )
            activations = {name: np.asarray(found[name]) for name in names}
            return Outputs(activations | {"logits": np.asarray(logits)}, state)

    def start(self, batch_size):
        with _jax_precision(self.dtype):
            return self._model.init_cache(batch_size)

    def arrays_of(self, state):
        return _flat(self.config, state, np.asarray)

    def parameters(self):
        return self._by_path(self._params)

    def gradients(self, tokens, segment_pos):
        with _jax_precision(self.dtype):
            return self._by_path(
                _jax_functions()[1](self._model, self._params, tokens, segment_pos)
            )

    def _by_path(self, tree: Any) -> Arrays:
        from recurrentgemma.jax.griffin import get_path

        return {
            spec.path: np.asarray(get_path(tree, spec.path)) for spec in layer_spec(self.config)
        }


def _jax_precision(dtype: str):
    import jax

    return jax.enable_x64(dtype == "float64")


@functools.cache
def _jax_functions():
    """Forward pass with activations, and gradients: compiled once a shape."""
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax.capture import activations

    def loss(params, model, tokens, segment_pos):
        logits, _ = model.apply({"params": params}, tokens, segment_pos)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        logprobs = jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
        follows = segment_pos[:, 1:] > 0
        return -jnp.where(follows, logprobs, 0).sum() / follows.sum()

    def gradients(model, params, tokens, segment_pos):
        return jax.grad(loss)(params, model, tokens, segment_pos)

    return (
        jax.jit(activations, static_argnums=0, static_argnames="names"),
        jax.jit(gradients, static_argnums=0),
    )


class TorchModel(Model):
    """The PyTorch twin."""

    def __init__(self, model: Any) -> None:
        self.config, self._model = model.config, model

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | None, dtype: str, overrides: Overrides = NO_OVERRIDES
    ) -> TorchModel:
        """From a checkpoint, or the bundled model if None."""
        import torch

        from recurrentgemma.torch import load_checkpoint

        return cls(load_checkpoint(path, dtype=getattr(torch, dtype), overrides=overrides))

    def cast(self, dtype):
        import torch

        from recurrentgemma.torch import Griffin

        model = Griffin(self.config, device="meta")
        wide = {k: v.to(getattr(torch, dtype)) for k, v in self._model.state_dict().items()}
        model.load_state_dict(wide, assign=True)
        return TorchModel(model)

    def run(self, tokens, segment_pos, state, names):
        import torch

        from recurrentgemma.torch.capture import activations

        inputs = torch.from_numpy(tokens.copy()), torch.from_numpy(segment_pos.copy())
        with torch.no_grad():
            found, logits, state = activations(self._model, *inputs, state, names=names)
        arrays = {name: _torch_array(value) for name, value in found.items()}
        return Outputs(arrays | {"logits": _torch_array(logits)}, state)

    def start(self, batch_size):
        return self._model.init_cache(batch_size)

    def arrays_of(self, state):
        return _flat(self.config, state, _torch_array)

    def parameters(self):
        return self._by_path({k: v.detach() for k, v in self._model.state_dict().items()})

    def gradients(self, tokens, segment_pos):
        import torch

        tokens, segment_pos = (torch.from_numpy(z.copy()) for z in (tokens, segment_pos))
        names, parameters = zip(*self._model.named_parameters(), strict=True)
        logits, _ = self._model(tokens, segment_pos)
        logprobs = logits[:, :-1].log_softmax(-1)
        logprobs = logprobs.gather(-1, tokens[:, 1:, None].long())[..., 0]
        follows = segment_pos[:, 1:] > 0
        loss = -torch.where(follows, logprobs, 0).sum() / follows.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return self._by_path(dict(zip(names, gradients, strict=True)))

    def _by_path(self, tensors: Mapping[str, Any]) -> Arrays:
        return {
            spec.path: to_torch(spec.path, _torch_array(tensors[torch_name(spec.path)]))
            for spec in layer_spec(self.config)
        }


def _torch_array(tensor: Any) -> np.ndarray:
    from recurrentgemma.torch.runtime.arrays import to_array

    return to_array(tensor)


def _flat(config: GriffinConfig, state: Mapping[str, Any], array: Any) -> Arrays:
    paths = (path.rpartition(".") for path in state_shapes(config))
    return {f"{block}.{field}": array(getattr(state[block], field)) for block, _, field in paths}


_MODULES = {"jax": ("jax", "flax"), "torch": ("torch",), "transformers": ("torch", "transformers")}
_INSTALL = {
    "jax": "'recurrentgemma[jax]'",
    "flax": "'recurrentgemma[jax]'",
    "torch": "'recurrentgemma[torch]'",
    "transformers": "transformers",
}


def require_installed(implementation: str) -> None:
    """Raises `MissingExtraError`, which has the pip command, unless it can run here."""
    for module in _MODULES[implementation]:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise MissingExtraError(f"a model in {implementation}", module, _INSTALL[module])


def load_model(
    implementation: str,
    path: str | os.PathLike[str] | None,
    dtype: str,
    overrides: Overrides = NO_OVERRIDES,
) -> Model:
    """A checkpoint of any format, or the bundled model if None, in an implementation.

    Args:
      implementation: "jax", "torch" or "transformers".
      path: The checkpoint.
      dtype: Of parameters and computation.
      overrides: What the checkpoint does not say of the model.

    Raises:
      CheckpointError: The implementation is not installed, or the checkpoint cannot be served.
    """
    require_installed(implementation)
    if implementation == "transformers":
        from recurrentgemma.parity.transformers_model import TransformersModel

        return TransformersModel.load(path, dtype, overrides)
    return {"jax": JaxModel, "torch": TorchModel}[implementation].load(path, dtype, overrides)
