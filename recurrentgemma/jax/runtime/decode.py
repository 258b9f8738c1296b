"""A model's steps as functions of its parameters and state, compiled with the state donated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from recurrentgemma.common.generation.engine import Sampled
from recurrentgemma.common.model.activations import activation_names
from recurrentgemma.jax.cache import Cache
from recurrentgemma.jax.capture import activations
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.runtime.compiler import compiler_options
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params
from recurrentgemma.jax.sampling import choose
from recurrentgemma.jax.sharding import automatic_mesh, on_mesh


class DecodeFunctions(NamedTuple):
    """What runs on the device. A cache and `seen` that go in are used up, except by `take`.

    Attributes:
      prefill: (params, cache, tokens [B, T], segment_pos [B, T]) to the cache after them.
      feed: (params, cache, tokens [B], segment_pos [B]) to logits [B, V] and the cache.
      score: (params, cache, tokens [B, T], segment_pos [B, T], targets [B, T]) to logits
        [B, T, V], the targets' log-probabilities [B, T] and the cache.
      watch: (params, cache, tokens [B, T], segment_pos [B, T]) to a bool for each of the model's
        `watched` parts, whether it is finite, and the cache, which is not used up.
      choose: (variant, settings, logits, numbers, seen) to what `Engine.choose` returns.
      burst: (variant, params, settings, cache, seen, tokens, segment_pos, left, numbers) to what
        `Engine.decode` returns.
      take: (cache, rows) to copies of these rows.
      put: (cache, rows, others) to the cache with other rows in their places.
    """

    prefill: Callable[..., Cache]
    feed: Callable[..., tuple[Array, Cache]]
    score: Callable[..., tuple[Array, Array, Cache]]
    watch: Callable[..., tuple[Array, Cache]]
    choose: Callable[..., tuple[Sampled, Array | None]]
    burst: Callable[..., tuple[Sampled, Cache, Array | None]]
    take: Callable[..., Any]
    put: Callable[..., Any]


def watched(model: Model) -> tuple[str, ...]:
    """The parts of a model in which NaN or infinity can begin, in order."""
    return *activation_names(model.config, inside=True), "logits"


def functions(model: Model) -> DecodeFunctions:
    """The steps as they are, not compiled."""
    model = model.clone(gradient_checkpointing=False)  # nothing is differentiated

    def apply(params: Params, **kwargs: Any) -> tuple[Any, Any]:
        result: Any = model.apply({"params": params}, **kwargs)
        return result

    def whole(x: Array) -> Array:
        """On a mesh every device has the result, as every process chooses a token."""
        if model.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, on_mesh(automatic_mesh(model.mesh)))

    def prefill(params, cache, tokens, segment_pos):
        return apply(
            params, tokens=tokens, segment_pos=segment_pos, cache=cache, return_logits=False
        )[1]

    def feed(params, cache, tokens, segment_pos):
        logits, cache = apply(
            params, tokens=tokens[:, None], segment_pos=segment_pos[:, None], cache=cache
        )
        return whole(logits[:, 0]), cache

    @default_promotion
    def score(params, cache, tokens, segment_pos, targets):
        logits, cache = apply(params, tokens=tokens, segment_pos=segment_pos, cache=cache)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
        logprobs = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
        return whole(logits), whole(logprobs), cache

    def watch(params, cache, tokens, segment_pos):
        names = watched(model)[:-1]
        found, logits, cache = activations(model, params, tokens, segment_pos, cache, names=names)
        parts = (*(found[name] for name in names), logits)
        return whole(jnp.stack([jnp.isfinite(part).all() for part in parts])), cache

    @default_promotion
    def burst(variant, params, settings, cache, seen, tokens, segment_pos, left, numbers):
        def step(carry, number):
            cache, seen, tokens, segment_pos, left = carry
            logits, cache = feed(params, cache, tokens, segment_pos)
            sampled, seen = _choose(variant, settings, logits, number, seen)
            ended = (sampled.tokens[:, None] == settings.stop_ids).any(-1)
            left = jnp.where(ended, 0, left - 1).clip(min=0)
            tokens = jnp.where(left > 0, sampled.tokens, 0).astype(tokens.dtype)
            segment_pos = jnp.where(left > 0, segment_pos + 1, -1)
            if variant.logits:
                sampled = sampled._replace(logits=logits)
            return (cache, seen, tokens, segment_pos, left), sampled

        carry = (cache, seen, tokens, segment_pos, left)
        (cache, seen, *_), sampled = jax.lax.scan(step, carry, numbers)
        return sampled, cache, seen

    return DecodeFunctions(prefill, feed, score, watch, _choose, burst, _take, _put)


def compiled(model: Model, platform: str) -> DecodeFunctions:
    """Shared by all samplers: another of the same model and shapes compiles nothing."""
    return _compiled(cast(Any, model), platform)  # hashable, as pyright does not see


@functools.lru_cache
def _compiled(model: Model, platform: str) -> DecodeFunctions:
    prefill, feed, score, watch, choose, burst, take, put = functions(model)
    compile = functools.partial(jax.jit, compiler_options=compiler_options(platform, in_place=True))
    return DecodeFunctions(
        compile(prefill, donate_argnames="cache"),
        compile(feed, donate_argnames="cache"),
        compile(score, donate_argnames="cache"),
        compile(watch),
        jax.jit(choose, static_argnames="variant", donate_argnames="seen"),
        compile(burst, static_argnames="variant", donate_argnames=("cache", "seen")),
        jax.jit(take),
        jax.jit(put, donate_argnames="cache"),
    )


@default_promotion
def _choose(variant, settings, logits, numbers, seen):
    sampled = choose(variant, settings, logits, jnp.asarray(numbers), seen)
    if seen is not None:
        seen = seen.at[jnp.arange(len(seen)), sampled.tokens].add(2)
    return sampled, seen


@default_promotion
def _take(cache, rows):
    return jax.tree.map(lambda value: value[rows], cache)


@default_promotion
def _put(cache, rows, others):
    return jax.tree.map(lambda value, other: value.at[rows].set(other), cache, others)
