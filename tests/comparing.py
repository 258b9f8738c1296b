"""The two twins of one model, for the engine of `recurrentgemma parity`."""

from collections.abc import Mapping

import numpy as np

from backends import BACKENDS, Backend, JaxBackend
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.parity import (
    JaxModel,
    Model,
    Report,
    TorchModel,
    compare,
    make_batch,
)


def make_model(
    backend: Backend, config: GriffinConfig, params: Mapping[str, np.ndarray], dtype: str
) -> Model:
    """A twin with these parameters, by path in the Flax layout."""
    network = backend.griffin(config, params, dtype)
    if isinstance(backend, JaxBackend):
        return JaxModel(network.module, network.params)  # pyright: ignore[reportAttributeAccessIssue]
    return TorchModel(network.module)  # pyright: ignore[reportAttributeAccessIssue]


def compare_twins(
    config: GriffinConfig,
    params: Mapping[str, np.ndarray],
    dtype: str,
    length: int | None = None,
    **kwargs,
) -> Report:
    """JAX against PyTorch, by default on rows of three times the attention window."""
    length = length or max(3 * config.attention_window_size, 24)
    return compare(
        lambda: make_model(BACKENDS["jax"], config, params, dtype),
        lambda: make_model(BACKENDS["torch"], config, params, dtype),
        make_batch(config, length),
        dtype,
        **kwargs,
    )
