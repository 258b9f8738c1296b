"""A model's matrices in fewer bytes (see `common.quantization`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import Quantized, input_axis, quantize, scheme_for
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path
from recurrentgemma.jax.sharding import is_split, on_host, place_beside, put


@default_promotion
def quantize_matrices(
    config: Config, params: Params, scheme: str | None = "q8", tables: bool = True
) -> Params:
    """The parameters with each matrix as `Quantized`; the others are shared.

    Args:
      config: The model.
      params: Its parameters. What is quantised already stays as it is.
      scheme: The scheme; None shares all parameters.
      tables: Whether the embedding is quantised, too.

    Raises:
      ValueError: The scheme is unknown, or does not fit a matrix; the message names it.
    """
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        name = scheme_for(spec, scheme) if tables or not spec.table else None
        if name is not None and not isinstance(value, Quantized):
            held = quantize(on_host(value), name, input_axis(spec), spec.path)
            value = held.with_parts(functools.partial(_beside, value, held.axis))
        set_path(result, spec.path, value)
    return result


def _beside(matrix: Any, axis: int, part: np.ndarray) -> Array:
    """A part of `Quantized` on the devices of its matrix, if that is split."""
    if not is_split(matrix):
        return jnp.asarray(part)
    return put(part, place_beside(matrix, part.shape, by_rows=axis == -2))


def dequantizing(params: Params) -> Params:
    """The parameters, computed with in a form that has gradients: no product quantises its rows."""
    return jax.tree.map(
        lambda leaf: leaf.replace(integer=False) if _is_quantized(leaf) else leaf,
        params,
        is_leaf=_is_quantized,
    )


def is_quantized(params: Params) -> bool:
    """Whether any parameter is quantised."""
    return any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized)))


def dtype_of(params: Params) -> Dtype:
    """The dtype of a computation with these parameters."""
    leaves = jax.tree.leaves(params, is_leaf=_is_quantized)
    return jnp.result_type(*(leaf.dtype for leaf in leaves))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
