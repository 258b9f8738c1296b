"""Computing with matrices that are kept as int8: each is dequantised where it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import Quantized, quantize
from recurrentgemma.jax.griffin import Params, get_path, set_path


def quantize_matrices(config: GriffinConfig, params: Params) -> Params:
    """The parameters with each matrix as `Quantized`; the others are shared."""
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        if spec.matrix:
            value = Quantized(*map(jnp.asarray, quantize(np.asarray(value))))
        set_path(result, spec.path, value)
    return result


def dequantized(quantized: Quantized, dtype: Dtype) -> Array:
    """The matrices of a `Quantized` in a dtype."""
    values, scale = map(jnp.asarray, quantized)
    return (values.astype(scale.dtype) * scale).astype(dtype)


@contextlib.contextmanager
def dequantizing() -> Iterator[None]:
    """Inside the block, a module whose parameters include a `Quantized` computes with its matrix.

    The matrix has the dtype of the module's input: it exists only during the module's call.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        own = module.variables.get("params", {}) if context.method_name == "__call__" else {}
        if not any(isinstance(value, Quantized) for value in own.values()):
            return call(*args, **kwargs)
        dtype = module.dtype or args[0].dtype
        whole = {
            leaf: dequantized(value, dtype) if isinstance(value, Quantized) else value
            for leaf, value in own.items()
        }
        return module.clone(parent=None).apply({"params": whole}, *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield
