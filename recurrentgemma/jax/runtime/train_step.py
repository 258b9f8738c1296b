"""A training step, compiled: a function of the parameters and the optimiser's state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from recurrentgemma.common.training.lora import trainable_specs
from recurrentgemma.common.training.optimization import decay_mask, step_settings
from recurrentgemma.jax.lora import adapted
from recurrentgemma.jax.loss import cross_entropy
from recurrentgemma.jax.optimizer import make_optimizer
from recurrentgemma.jax.products import dense, promote_dtype
from recurrentgemma.jax.runtime.axes import automatic, partition
from recurrentgemma.jax.runtime.compiler import compiler_options, platform_of
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path
from recurrentgemma.jax.scan.gates import wide_dtype


class Functions(NamedTuple):
    """The compiled functions.

    Attributes:
      total: The weighted sum of -log p(target).
      update: A step; the buffers of parameters and optimiser state are donated.
    """

    total: Callable[..., Array]
    update: Callable[..., tuple[dict[str, Array], Any, dict[str, Array]]]


def compiled(parameters: Any, optimizer_state: Any = None) -> Functions:
    """The functions for the devices of these arrays, shared by all training on them.

    A step leaves the arrays split over a mesh with automatic axes as they are.
    """
    leaves, tree = jax.tree.flatten((parameters, optimizer_state))
    places: Any = tuple(getattr(leaf, "sharding", None) for leaf in leaves)
    split = all(isinstance(place, NamedSharding) for place in places)
    if not split or any(place.mesh.explicit_axes for place in places):
        return _compiled(platform_of(parameters))
    return _compiled(platform_of(parameters), tree, places)


@functools.lru_cache
def _compiled(platform: str, tree: Any = None, places: tuple[Any, ...] = ()) -> Functions:
    compile = functools.partial(jax.jit, compiler_options=compiler_options(platform))
    out: dict[str, Any] = (
        {} if tree is None else {"out_shardings": (*jax.tree.unflatten(tree, places), None)}
    )
    return Functions(
        compile(_trained_total, static_argnums=(0, 1, 2)),
        compile(_update, static_argnums=(0, 1, 2, 3), donate_argnums=(4, 5), **out),
    )


def total(model, params, batch, adapters, lora) -> Float[Array, ""]:
    """The weighted sum of -log p(target)."""

    def function(params, batch, adapters):
        return _total(model, params, batch, adapters, lora)

    return automatic(function, lambda _: PartitionSpec(), params, batch, adapters)


@default_promotion
def _total(model, params, batch, adapters, lora) -> Float[Array, ""]:
    if lora:
        params = adapted(model.config, params, adapters, lora)
    if model.scan_layers is None:
        model = model.clone(scan_layers=model.mesh is not None and model.mesh.size > 1)
    variables = {"params": params}
    hidden, _ = model.apply(variables, batch.tokens, batch.segment_pos, method=model.hidden)
    embedding = dense(get_path(params, "embedder.input_embedding"))
    hidden, embedding = promote_dtype(hidden, embedding, dtype=model.dtype)
    soft_cap = model.config.model.soft_cap
    targets, weights = jnp.asarray(batch.targets), as_weights(batch.weights)
    return cross_entropy(hidden, embedding, targets, weights, soft_cap, mesh=model.mesh)


@default_promotion
def as_weights(weights: Any) -> Array:
    """Weights of any dtype in float32 or wider."""
    weights = jnp.asarray(weights)
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32))


@default_promotion
def divisor(tokens: Array) -> Array:
    """The divisor that turns a sum over tokens into their mean, which is 0 for no tokens."""
    return jnp.where(tokens > 0, tokens, 1)


def tree_of(parameters: Mapping[str, Array], dtype: Dtype, copy: bool = False) -> Params:
    """Parameters by path as a tree, cast."""
    tree: dict[str, Any] = {}
    for path, value in parameters.items():
        set_path(tree, path, jnp.array(value, dtype, copy=copy))
    return tree


@default_promotion
def _trained_total(model, lora, dtype, parameters, base, batch):
    """`total` of the trained parameters, or of trained adapters on a base."""
    if lora is None:
        return total(model, tree_of(parameters, dtype), batch, None, None)
    return total(model, base, batch, parameters, lora)


def _update(model, options, lora, dtype, parameters, optimizer_state, base, batches, rate):
    def function(*args):
        return _updated(model, options, lora, dtype, *args)

    def split(results):
        return *jax.tree.map(partition, state), dict.fromkeys(results[-1], PartitionSpec())

    state = parameters, optimizer_state
    return automatic(function, split, *state, base, batches, rate)


@default_promotion
def _updated(model, options, lora, dtype, parameters, optimizer_state, base, batches, rate):
    tokens = as_weights(batches.weights).sum()

    def share(parameters, batch):
        return _trained_total(model, lora, dtype, parameters, base, batch) / divisor(tokens)

    def accumulate(sums, batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(share)(parameters, batch)), None

    def value(parameters):
        return jax.lax.map(functools.partial(share, parameters), batches).sum()

    loss_dtype = jnp.promote_types(wide_dtype(dtype), tokens.dtype)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), loss_dtype), parameters))
    (loss, grads), _ = jax.lax.scan(accumulate, zeros, batches)
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(wide_dtype(g.dtype)), grads))
    settings = step_settings(options)
    if settings.clip_norm is not None:
        scale = jnp.minimum(1.0, settings.clip_norm / norm)
        grads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
    decay = decay_mask(trainable_specs(model.config, lora))
    optimizer = make_optimizer(options, decay, rate)
    before = parameters, optimizer_state
    updates, optimizer_state = optimizer.update(
        grads, optimizer_state, parameters, value=loss, grad=grads, value_fn=value
    )
    parameters = optax.apply_updates(parameters, updates)
    if settings.skip_nonfinite:
        keep = functools.partial(jnp.where, jnp.isfinite(loss) & jnp.isfinite(norm))
        parameters, optimizer_state = jax.tree.map(keep, (parameters, optimizer_state), before)
    metrics = {"loss": loss, "tokens": tokens, "grad_norm": norm}
    return parameters, optimizer_state, metrics
