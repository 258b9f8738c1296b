"""Parameters in the form in which a step is fast on the device that holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.quantization import LARGEST, SCHEMES, Quantized, input_axis
from recurrentgemma.jax.products import STORED, OnGPU, Rows, Turned, dense
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

    Leaves that already have such a form are shared. So are the bytes of a table, and of `OnGPU`.
    """
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        set_path(result, spec.path, as_stored(spec, get_path(params, spec.path)))
    return result


def as_stored(spec: ParamSpec, value: Any, copies: bool = True) -> Any:
    """A parameter in the form that its device multiplies fast; as it is on several devices.

    On a CPU matrices in bfloat16 become `Rows`, and a small table in float32 becomes `Turned`. On a
    CPU or TPU matrices of 4 bits become int8, rounded once more: an error of at most half a step,
    1/254 of an output's largest weight. On a GPU quantised matrices become `OnGPU`, if the kernel
    works.

    Args:
      spec: The parameter.
      value: An array, or a form of one.
      copies: Whether the caller keeps the given bytes too. On a CPU a copy then pays for bfloat16
        and for a small table alone.
    """
    platform = _sole_platform(value)
    if isinstance(value, Quantized) and platform == "gpu":
        return as_on_gpu(value)
    if isinstance(value, Quantized) and platform and SCHEMES[value.scheme].bits == 4:
        return as_q8(value)
    return _on_cpu(spec, value, copies) if platform == "cpu" else value


def _sole_platform(value: Any) -> str | None:
    """The platform of the only device of a value's arrays; None if they have several."""
    sharding = jax.tree.leaves(value)[0].sharding
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


def _on_cpu(spec: ParamSpec, value: Any, copies: bool) -> Any:
    """An array in the form that a CPU multiplies faster, if there is one."""
    if isinstance(value, STORED) or not (spec.matrix or spec.table):
        return value
    if copies and spec.table and value.dtype == jnp.float32 and value.size <= _SMALL:
        return Turned(value, value.T)
    large = not copies and value.shape[-2] * value.shape[-1] >= _LARGE
    if value.dtype != jnp.bfloat16 and not (large and value.dtype == jnp.float32):
        return value
    axis = input_axis(spec)
    return Rows(value if axis == -1 else value.swapaxes(-1, -2), axis)


@jax.jit
@default_promotion
def as_q8(w: Quantized) -> Quantized:
    """A matrix of 4 bits as int8; see `common.quantization.quantize`."""
    matrix = dense(w.replace(dtype="float32"))
    rows = matrix if w.axis == -1 else matrix.swapaxes(-1, -2)
    scale = jnp.abs(rows).max(-1, keepdims=True) / LARGEST
    values = jnp.rint(rows / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return w.replace(values=values, scale=scale, zero=None, scheme="q8")
