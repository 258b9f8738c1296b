"""A model as the comparison sees it: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import abc
import os
from typing import Any

import numpy as np

from recurrentgemma.common.errors import MissingExtraError
from recurrentgemma.common.extras import is_installed, require
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import state_spec
from recurrentgemma.common.twin import PACKAGES, Outputs, Twin, find_twin
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides

Arrays = dict[str, np.ndarray]


class ComparedModel(abc.ABC):
    """A model in one dtype. Arrays have the dtypes that the framework computed.

    Attributes:
      config: Its config.
      widest: The widest dtype that all of its arithmetic follows.
      plain: Whether it can only read whole documents, one a row and without padding.
    """

    config: Config
    widest = "float64"
    plain = False

    @abc.abstractmethod
    def cast(self, dtype: str) -> ComparedModel:
        """The same weights, cast."""

    @abc.abstractmethod
    def run(
        self, tokens: np.ndarray, segment_pos: np.ndarray, state: Any, names: tuple[str, ...]
    ) -> Outputs:
        """A forward pass from a state, None at the start; see `Twin.forward`."""

    @abc.abstractmethod
    def start(self, batch_size: int, capacity: int) -> Any:
        """The state before the first token, with room for so many tokens if it grows."""

    @abc.abstractmethod
    def arrays_of(self, state: Any) -> Arrays:
        """A state's arrays, by "blocks.N.field"."""

    @abc.abstractmethod
    def parameters(self) -> Arrays:
        """Every parameter in the Flax layout, by path."""

    @abc.abstractmethod
    def gradients(self, tokens: np.ndarray, segment_pos: np.ndarray) -> Arrays:
        """The gradients of the mean loss over each document's tokens but its first, by path."""


class TwinModel(ComparedModel):
    """A model of a twin."""

    def __init__(self, twin: Twin, model: Any) -> None:
        self.config, self._twin, self._model = model.config, twin, model

    def cast(self, dtype):
        return TwinModel(self._twin, self._twin.make(self.config, self.parameters().items(), dtype))

    def run(self, tokens, segment_pos, state, names):
        return self._twin.forward(self._model, tokens, segment_pos, state, names)

    def start(self, batch_size, capacity):
        return self._twin.init_state(self._model, batch_size, capacity)

    def arrays_of(self, state):
        arrays = self._twin.state_arrays(state)  # JAX sorts names, "blocks.10" before "blocks.2"
        return {spec.path: arrays[spec.path] for spec in state_spec(self.config)}

    def parameters(self):
        return self._twin.params(self._model)

    def gradients(self, tokens, segment_pos):
        return self._twin.gradients(self._model, tokens, segment_pos)


def require_installed(implementation: str) -> None:
    """Raises `MissingExtraError`, which has the pip command, unless it can run here."""
    require(*PACKAGES.get(implementation, PACKAGES["torch"]))
    if implementation == "transformers" and not is_installed("transformers"):
        raise MissingExtraError("a model in transformers", "transformers", "transformers")


def load_model(
    implementation: str,
    path: str | os.PathLike[str] | None,
    dtype: str,
    overrides: Overrides = NO_OVERRIDES,
    as_stored: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
) -> ComparedModel:
    """A checkpoint of any format, or the bundled model if None, in an implementation.

    Args:
      implementation: "jax", "torch" or "transformers".
      path: The checkpoint.
      dtype: The dtype of parameters and computation.
      overrides: What the checkpoint does not say of the model.
      as_stored: Whether `transformers` reads the folder by itself, with the config that is there.
      adapter: LoRA adapters to add to the parameters; see `load_checkpoint`.
      quantize: The scheme in which a twin keeps matrices. Products are in the dequantised form: in
        the other the rounding of rows turns a last bit into a step of 1 / 127.

    Raises:
      CheckpointError: The implementation is not installed, or the checkpoint cannot be loaded.
    """
    require_installed(implementation)
    if implementation == "transformers":
        from recurrentgemma.parity.transformers_model import TransformersModel

        return TransformersModel.load(path, dtype, overrides, as_stored, adapter)
    twin = find_twin(implementation)
    model = twin.load(path, dtype, overrides=overrides, adapter=adapter, quantize=quantize)
    return TwinModel(twin, twin.dequantizing(model))
