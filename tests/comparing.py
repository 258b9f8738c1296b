"""The two twins of one model, for the engine of `recurrentgemma parity`."""

from collections.abc import Mapping

import numpy as np

from backends import BACKENDS, Backend
from recurrentgemma.common.model.config import Config
from recurrentgemma.parity import Model, Report, TwinModel, compare, default_length, make_batch


def make_model(
    backend: Backend, config: Config, params: Mapping[str, np.ndarray], dtype: str
) -> Model:
    """A twin with these parameters, by path in the Flax layout."""
    return TwinModel(backend.twin, backend.twin.make(config, params.items(), dtype))


def compare_twins(
    config: Config,
    params: Mapping[str, np.ndarray],
    dtype: str,
    length: int | None = None,
    **kwargs,
) -> Report:
    """JAX against PyTorch, by default on rows that leave the attention window well behind."""
    length = length or max(3 * (default_length(config) - 64), 24)
    return compare(
        lambda: make_model(BACKENDS["jax"], config, params, dtype),
        lambda: make_model(BACKENDS["torch"], config, params, dtype),
        make_batch(config, length),
        dtype,
        **kwargs,
    )
