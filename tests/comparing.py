"""The two twins of one model, compared."""

from collections.abc import Mapping

import numpy as np
from cases import make_batch as make_rows
from cases import make_params

from backends import BACKENDS, Backend
from recurrentgemma.common.model.config import Config
from recurrentgemma.parity import (
    ComparedModel,
    Report,
    TwinModel,
    compare,
    default_length,
    make_batch,
)
from tolerances import assert_close


def make_model(
    backend: Backend, config: Config, params: Mapping[str, np.ndarray], dtype: str
) -> ComparedModel:
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


def check_gradients(twins: tuple[Backend, Backend], config: Config, length: int) -> None:
    """Every gradient of both twins, in float64: they are the same, and there is one."""
    tokens, segment_pos = make_rows(config, length)
    dy = np.random.default_rng(0).standard_normal((*tokens.shape, config.vocab_size))
    dy[segment_pos < 0] = 0
    models = [backend.griffin(config, make_params(config)) for backend in twins]
    _, dstate = models[0](tokens, segment_pos)  # as good as other cotangents
    one, other = (model.grads(tokens, segment_pos, dy=dy, dstate=dstate) for model in models)
    assert_close(one, other, "gradient", "float64")
    for path, gradient in one["params"].items():
        assert np.abs(gradient).max() > 1e-6, f"{path} has no gradient"
