"""How a model runs its blocks: those that differ in parameters alone are traced once.

Where layers repeat, as R R A, the repetitions may also be compiled once, as the body of a loop.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from recurrentgemma.jax.runtime.trees import Params
from recurrentgemma.jax.sharding import TokenSplit, constrained, gathering, stack_at_rest


def run_blocks(
    model: Any,
    make: Callable[..., Any],
    split: TokenSplit,
    x: Array,
    segment_pos: Array,
    cache: Any = None,
) -> tuple[Array, dict[str, Any]]:
    """The outputs of all blocks of a model, and the state after them.

    Args:
      model: The model. Its `gradient_checkpointing` says whether the backward pass computes each
        block's activations again, and its `scan_layers` whether repeated layers are a loop. Neither
        holds where Linen must see the calls of modules, nor a loop where a state is given.
      make: Makes the block of a layer.
      split: How the model's mesh splits what a block returns.
      x: Hidden states, [B, T, D].
      segment_pos: Positions, [B, T].
      cache: The state to continue from, if any.
    """
    layers, watched = model.config.model.layers, _watched(model)
    states: list[Any] = []
    if model.scan_layers and cache is None and not watched:
        x, states = _repeated(model, make, split, x, segment_pos)
    for i in range(len(states), len(layers)):
        name = f"blocks.{i}"
        inputs = x, segment_pos, cache[name] if cache else None
        if watched:
            x, state = make(layer=layers[i], name=name)(*inputs)
        else:
            block, params = make(layer=layers[i], parent=None), model.variables["params"][name]
            x, state = _traced_once(block, model.gradient_checkpointing, params, *inputs)
        x = constrained(x, model.mesh, split)
        states.append(state)
    return x, {f"blocks.{i}": state for i, state in enumerate(states)}


def repetitions(kinds: Sequence[Any]) -> tuple[int, int]:
    """The period with which a sequence begins, and how often it comes, so that the least is left.

    R R A R R A R is 3 and 2: one R is left. Where nothing repeats, the period comes once.
    """

    def times(period: int) -> int:
        same = (kinds[i] == kinds[i % period] for i in range(len(kinds)))
        return next((i for i, equal in enumerate(same) if not equal), len(kinds)) // period

    found = ((period, times(period)) for period in range(1, len(kinds) + 1))
    return min(found, key=lambda pair: pair[0] - pair[0] * pair[1], default=(0, 0))


def _repeated(
    model: Any, make: Callable[..., Any], split: TokenSplit, x: Array, segment_pos: Array
) -> tuple[Array, list[Any]]:
    """The outputs of the layers that repeat and the state of each; nothing if none does."""
    layers = model.config.model.layers
    params = [model.variables["params"][f"blocks.{i}"] for i in range(len(layers))]
    shapes = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in params)
    period, times = repetitions(list(zip(layers, shapes, strict=True)))
    blocks = [make(layer=layer, parent=None) for layer in layers[:period]]

    def repetition(x: Array, params: Sequence[Params]) -> tuple[Array, list[Any]]:
        states = []
        for block, own in zip(blocks, params, strict=True):
            inputs = own, x, segment_pos, None
            x, state = _traced_once(block, model.gradient_checkpointing, *inputs)
            x = constrained(x, model.mesh, split)
            states.append(state)
        return x, states

    # A loop keeps the dtype of x, which wider parameters would change.
    if times < 2 or jax.eval_shape(repetition, x, params[:period])[0].dtype != x.dtype:
        return x, []
    stacks = []
    for i, block in enumerate(blocks):
        stack = jax.tree.map(lambda *parts: jnp.stack(parts), *params[i : period * times : period])
        if model.mesh is not None:
            stack = stack_at_rest(model.mesh, block.width, block.layer)(stack)
        stacks.append(stack)
    x, stacked = jax.lax.scan(repetition, x, stacks)
    states = (jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(times))
    return x, list(itertools.chain.from_iterable(states))


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
