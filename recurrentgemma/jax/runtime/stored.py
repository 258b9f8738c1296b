"""Parameters in the form in which a step is fast on the device that holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.quantization import LARGEST, SCHEMES, Quantized, input_axis
from recurrentgemma.jax.products import OnGPU, Rows, Turned, dense
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path

# float32 values of a matrix from which products gain: of a stack XLA copies each matrix before a
# product with many rows.
_LARGE = 2**20
_SMALL = 2**22  # values of a table that may be held twice


def num_bytes(params: Params) -> int:
    """The size of the parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def stored(config: Config, params: Params) -> Params:
    """The parameters for an engine in the forms that one device multiplies fast.

    On a CPU matrices in bfloat16 become `Rows`, and a small table in float32 becomes `Turned`. On a
    CPU or TPU matrices of 4 bits become int8, rounded once more: an error of at most half a step,
    1/254 of an output's largest weight. On a GPU quantised matrices become `OnGPU`, if the kernel
    works. All other leaves are shared, and so are the bytes of a table and of `OnGPU`. Parameters
    on several devices stay as they are.
    """
    shardings = {leaf.sharding for leaf in jax.tree.leaves(params)}
    platforms = {_sole_platform(sharding) for sharding in shardings}
    platform = platforms.pop() if len(platforms) == 1 else None
    if platform is None:
        return params
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        if isinstance(value, Quantized) and platform == "gpu":
            value = as_on_gpu(value)
        elif isinstance(value, Quantized) and SCHEMES[value.scheme].bits == 4:
            value = as_q8(value)
        set_path(result, spec.path, on_cpu(spec, value) if platform == "cpu" else value)
    return result


def _sole_platform(sharding: Sharding) -> str | None:
    """The platform of the only device of a sharding; None if it has several."""
    (device, *_) = sharding.device_set
    return device.platform if isinstance(sharding, SingleDeviceSharding) else None


def as_on_gpu(w: Quantized) -> Quantized:
    """A quantised matrix as `OnGPU`, if the kernel works on its device."""
    from recurrentgemma.jax.runtime.pallas_products import kernel_works

    (device,) = w.scale.devices()
    if isinstance(w, OnGPU) or not kernel_works(device, w.scheme, w.dtype):
        return w
    fields = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
    return OnGPU(**fields)


def as_rows(spec: ParamSpec, value: Any, copies: bool = True) -> Any:
    """An array of matrices that XLA multiplies faster as `Rows`; anything else as it is.

    Args:
      spec: The parameter.
      value: An array, which may also be NumPy's, or what it is kept as already.
      copies: Whether other bytes stay behind: then only bfloat16 is worth another form.
    """
    if isinstance(value, Quantized | Rows) or not (spec.matrix or spec.table):
        return value
    large = not copies and value.shape[-2] * value.shape[-1] >= _LARGE
    if value.dtype != jnp.bfloat16 and not (large and value.dtype == jnp.float32):
        return value
    axis = input_axis(spec)
    return Rows(value if axis == -1 else value.swapaxes(-1, -2), axis)


def on_cpu(spec: ParamSpec, value: Any) -> Any:
    """A parameter in the form that a CPU multiplies fast."""
    value = as_rows(spec, value)
    small = isinstance(value, Array) and value.dtype == jnp.float32 and value.size <= _SMALL
    return Turned(value, value.T) if spec.table and small else value


def on_one_cpu(sharding: Sharding) -> bool:
    """Whether arrays are on one device, which is a CPU."""
    return _sole_platform(sharding) == "cpu"


@jax.jit
@default_promotion
def as_q8(w: Quantized) -> Quantized:
    """A matrix of 4 bits as int8; see `common.quantization.quantize`."""
    matrix = dense(w.replace(dtype="float32"))
    rows = matrix if w.axis == -1 else matrix.swapaxes(-1, -2)
    scale = jnp.abs(rows).max(-1, keepdims=True) / LARGEST
    values = jnp.rint(rows / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return w.replace(values=values, scale=scale, zero=None, scheme="q8")
