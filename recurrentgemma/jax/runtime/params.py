"""A model's parameters: as the layer spec draws them, and on the devices of its mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import sample_params
from recurrentgemma.jax.runtime.trees import Params, get_path, require_available, set_path
from recurrentgemma.jax.sharding import is_split, put, shardings

if TYPE_CHECKING:
    from recurrentgemma.jax.model import Model


def init_params(
    config: Config, seed: int, dtype: Dtype = jnp.float32, *, mesh: Mesh | None = None
) -> Params:
    """Initial parameters as the layer spec draws them: the PyTorch twin's, bit for bit.

    Args:
      config: The model.
      seed: The seed.
      dtype: The dtype of the parameters.
      mesh: The devices that they are split over; the first device if None.

    Raises:
      ValueError: JAX has the dtype turned off, or the mesh does not fit the model.
    """
    require_available(dtype)
    places = None if mesh is None else shardings(config, mesh)
    params: dict[str, Any] = {}
    for spec, value in sample_params(config, seed):
        on_device = put(value, places[spec.path], dtype) if places else jnp.asarray(value, dtype)
        set_path(params, spec.path, on_device)
    return params


def laid_out(model: Model, params: Params) -> Params:
    """The parameters without a `params` level; on the model's mesh, if it has one."""
    params = params.get("params", params)
    if model.mesh is None or is_split(get_path(params, "embedder.input_embedding")):
        return params
    result: dict[str, Any] = {}
    for path, place in shardings(model.config, model.mesh).items():
        set_path(result, path, put(get_path(params, path), place))
    return result
