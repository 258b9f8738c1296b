"""Low-rank adapters in the forward pass, and merged into the parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec, sample_param
from recurrentgemma.common.quantization import Quantized
from recurrentgemma.common.training.lora import LoraOptions, adapter_specs, trainable_specs
from recurrentgemma.common.training.lora import merge as merge_on_host
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.products import Adapted, dense
from recurrentgemma.jax.quantization import dequantizing, quantize_matrices
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path
from recurrentgemma.jax.scan.gates import wide_dtype
from recurrentgemma.jax.sharding import put, shardings
from recurrentgemma_conversion.adapters import open_adapters


def adapted(
    config: Config, params: Params, adapters: Mapping[str, Array], options: LoraOptions
) -> Params:
    """Parameters with which modules compute y = x W + b + alpha / rank (x A) B.

    Args:
      config: The model.
      params: Its parameters. They are shared.
      adapters: A and B of each target, by the paths of `adapter_specs`.
      options: The options that they were made with.
    """
    result: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(params, spec.path)
        if spec.lora in options.targets:
            a, b = (adapters[matrix.path] for matrix in adapter_specs(spec, options.rank))
            value = Adapted(value, options.scale * a, b)
        set_path(result, spec.path, value)
    return result


@default_promotion
def adapt(
    config: Config,
    params: Params,
    options: LoraOptions,
    dtype: Dtype,
    seed: int,
    mesh: Mesh | None = None,
) -> tuple[Params, dict[str, Array]]:
    """The frozen parameters under adapters, and the adapters.

    Args:
      config: The model.
      params: Its parameters. They are shared, except for matrices that are quantised.
      options: What to adapt, and how.
      dtype: The dtype of the adapters.
      seed: Determines their initial values.
      mesh: The devices that the adapters are split over, if they are.

    Returns:
      The parameters, and A and B of each target by the paths of `adapter_specs`.
    """
    specs = trainable_specs(config, options)
    values = ((spec.path, sample_param(spec, seed)) for spec in specs)
    if mesh is None:
        adapters = {path: jnp.asarray(value, dtype) for path, value in values}
    else:
        places = shardings(config, mesh, options)
        adapters = {path: put(value, places[path], dtype) for path, value in values}
    return dequantizing(quantize_matrices(config, params, options.scheme, False)), adapters


@default_promotion
def merge(
    config: Config,
    base: Params,
    adapters: Mapping[str, Array],
    options: LoraOptions,
    dtype: Dtype,
) -> Params:
    """The parameters, in a dtype, of a plain model that computes what the adapted one does."""
    params: dict[str, Any] = {}
    for spec in layer_spec(config):
        value = get_path(base, spec.path)
        if isinstance(value, Quantized):
            value = dense(value.replace(dtype="float32"))
        if spec.lora in options.targets:
            a, b = (
                adapters[matrix.path].astype(wide_dtype(dtype))
                for matrix in adapter_specs(spec, options.rank)
            )
            value = value.astype(a.dtype) + options.scale * (a @ b)
        set_path(params, spec.path, value.astype(dtype))
    return params


def load_adapters(path: str | os.PathLike[str], model: Model, params: Params) -> Params:
    """A model's parameters with the adapters in a file merged into them.

    Args:
      path: A file of ours or its folder, or a folder of PEFT's.
      model: The model.
      params: Its parameters. They do not change; those without adapters are shared.

    Raises:
      CheckpointError: There are no adapters, they are damaged, or belong to another model.
    """
    _, options, arrays = open_adapters(path, model.config)
    result: Params = {}
    for spec in layer_spec(model.config):
        value = get_path(params.get("params", params), spec.path)
        on_host = np.asarray(dense(value))
        merged = merge_on_host(spec, on_host, arrays, options)
        if merged is not on_host:
            place = jax.tree.leaves(value)[0].sharding
            value = jax.device_put(merged.astype(on_host.dtype), place)
        set_path(result, spec.path, value)
    return result
