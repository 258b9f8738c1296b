"""How low-rank adapters enter the forward pass, and leave it merged into the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float

from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.training.lora import LoraOptions, Quantized, adapter_specs, quantize
from recurrentgemma.jax.layers import BlockDiagonalLinear, Einsum
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path
from recurrentgemma.jax.scan.gates import wide_dtype

_KERNELS = {nn.Dense: "kernel", Einsum: "w", BlockDiagonalLinear: "w"}


def frozen_base(config: GriffinConfig, params: Params, options: LoraOptions) -> Params:
    """The parameters under adapters: those given, matrices as `Quantized` if so asked."""
    base: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        if options.quantize and spec.lora is not None:
            value = Quantized(*map(jnp.asarray, quantize(np.asarray(value))))
        set_path(base, spec.path, value)
    return base


@contextlib.contextmanager
def adapted(adapters: Mapping[str, Array], options: LoraOptions) -> Iterator[None]:
    """While it is open, a Griffin on a frozen base computes y = x W + b + alpha / rank (x A) B.

    Args:
      adapters: A and B of each target, by the paths of `adapter_specs`.
      options: What they were made of.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        leaf = _KERNELS.get(type(module))
        if leaf is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        (x,) = args
        parameters = module.variables["params"]
        if isinstance(parameters[leaf], Quantized):
            whole = {**parameters, leaf: _dequantized(parameters[leaf], module.dtype or x.dtype)}
            y = module.clone(parent=None).apply({"params": whole}, x)
        else:
            y = call(x)
        path = ".".join((*module.path, leaf))
        if f"{path}.lora_a" not in adapters:
            return y
        a, b = (adapters[f"{path}.{name}"] for name in ("lora_a", "lora_b"))
        delta = _product(module, x, options.scale * a, b)
        return jax.tree.map(lambda y, d: y + d.astype(y.dtype), y, delta)

    with nn.intercept_methods(intercept):
        yield


def _product(module: nn.Module, x: Float[Array, "b t i"], a: Array, b: Array):
    """x A B, in the dtype of x, as the module arranges a product with its own kernel."""
    a_cir, b_crj = (m.astype(x.dtype).reshape(-1, *m.shape[-2:]) for m in (a, b))
    if isinstance(module, BlockDiagonalLinear):
        x_cbti = jnp.stack(jnp.split(x, len(a_cir), -1))
    else:
        x_cbti = x[None]
    y_cbtj = x_cbti @ a_cir[:, None] @ b_crj[:, None]
    if isinstance(module, BlockDiagonalLinear):
        return jnp.concatenate(y_cbtj, -1)
    return y_cbtj if isinstance(module, Einsum) else y_cbtj[0]


def _dequantized(quantized: Quantized, dtype: Dtype) -> Array:
    values, scale = map(jnp.asarray, quantized)
    return (values.astype(scale.dtype) * scale).astype(dtype)


def merge(
    config: GriffinConfig,
    base: Params,
    adapters: Mapping[str, Array],
    options: LoraOptions,
    dtype: Dtype,
) -> Params:
    """The parameters of a plain model that computes what the adapted one does, in a dtype."""
    params: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(base, spec.path)
        if isinstance(value, Quantized):
            value = _dequantized(value, wide_dtype(dtype))
        if spec.lora in options.targets:
            a, b = (
                adapters[matrix.path].astype(wide_dtype(dtype))
                for matrix in adapter_specs(spec, options.rank)
            )
            value = value.astype(a.dtype) + options.scale * (a @ b)
        set_path(params, spec.path, value.astype(dtype))
    return params
