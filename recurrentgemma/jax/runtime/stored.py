"""Parameters in the form in which a step is fast on the device that holds them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import SingleDeviceSharding

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import SCHEMES, Quantized, input_axis
from recurrentgemma.jax.products import Rows, dense
from recurrentgemma.jax.runtime.compiler import platform_of
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path


def stored(config: Config, params: Params) -> Params:
    """The parameters for an engine: on one CPU, matrices that XLA multiplies fast.

    Matrices in bfloat16 become `Rows`, and matrices of 4 bits int8, rounded once more: an error of
    at most half a step, 1/254 of an output's largest weight. All other leaves are shared, and so
    are the bytes of a table.
    """
    if platform_of(params) != "cpu":
        return params
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        if isinstance(value, Quantized) and SCHEMES[value.scheme].bits == 4:
            value = _as_q8(value)
        elif (spec.matrix or spec.table) and _is_whole(value) and value.dtype == jnp.bfloat16:
            axis = input_axis(spec)
            value = Rows(value if axis == -1 else value.swapaxes(-1, -2), axis)
        set_path(result, spec.path, value)
    return result


def _is_whole(value: Any) -> bool:
    return isinstance(value, Array) and isinstance(value.sharding, SingleDeviceSharding)


@jax.jit
@default_promotion
def _as_q8(w: Quantized) -> Quantized:
    """See `common.quantization.quantize`."""
    matrix = dense(w.replace(dtype="float32"))
    rows = matrix if w.axis == -1 else matrix.swapaxes(-1, -2)
    scale = jnp.abs(rows).max(-1, keepdims=True) / 127
    values = jnp.rint(rows / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return w.replace(values=values, scale=scale, zero=None, scheme="q8")
