"""How a model runs its blocks: those that differ in parameters alone are traced once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from recurrentgemma.jax.runtime.trees import Params
from recurrentgemma.jax.sharding import gathering


def run_block(model: Any, make: Callable[..., Any], name: str, *inputs: Any) -> tuple[Array, Any]:
    """The outputs of a block inside a model, and the state after them.

    Args:
      model: The model, whose `gradient_checkpointing` says whether the backward pass computes the
        block's activations again. It does not where Linen must see the calls of modules.
      make: Makes the block.
      name: The block's name in the model.
      inputs: The arguments of the block.
    """
    if _watched(model):
        return make(name=name)(*inputs)
    params = model.variables["params"][name]
    return _traced_once(make(parent=None), model.gradient_checkpointing, params, *inputs)


def _watched(module: nn.Module) -> bool:
    """Whether Linen must see the calls of the modules inside: it makes, keeps or changes values."""
    intercepted = bool(nn.module._global_interceptor_stack)  # Linen has no public name for it
    captured = module.is_mutable_collection("intermediates")
    return module.is_initializing() or captured or intercepted


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced_once(block: Any, remat: bool, params: Params, *inputs: Any) -> tuple[Array, Any]:
    def call(params: Params, *inputs: Any) -> Any:
        variables: Any = {"params": params}
        if block.mesh is not None:
            variables = gathering(block.mesh, block.width, block.layer)(variables)
        return block.apply(variables, *inputs)

    return (jax.checkpoint(call) if remat else call)(params, *inputs)
