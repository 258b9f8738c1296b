"""Computing with matrices that are kept as int8: each is dequantised where it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import Quantized, dequantize, quantize
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path
from recurrentgemma.jax.sharding import is_split, on_host, place_beside, put


@default_promotion
def quantize_matrices(config: Config, params: Params) -> Params:
    """The parameters with each matrix as `Quantized`; the others are shared."""
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        if spec.matrix:
            value = Quantized(*(_beside(value, part) for part in quantize(on_host(value))))
        set_path(result, spec.path, value)
    return result


def _beside(matrix: Any, part: np.ndarray) -> Array:
    """Values or scales on the devices of their matrix, if it is split."""
    return put(part, place_beside(matrix, part.shape)) if is_split(matrix) else jnp.asarray(part)


@contextlib.contextmanager
def dequantizing() -> Iterator[None]:
    """Inside the block, a module whose parameters include a `Quantized` computes with its matrix.

    The matrix has the dtype of the module's input: it exists only during the module's call.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        own = module.variables.get("params", {}) if context.method_name == "__call__" else {}
        found = {leaf: value for leaf, value in own.items() if isinstance(value, Quantized)}
        if not found:
            return call(*args, **kwargs)
        dtype = module.dtype or args[0].dtype
        matrices = {leaf: dequantize(value).astype(dtype) for leaf, value in found.items()}
        return module.clone(parent=None).apply({"params": {**own, **matrices}}, *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield
