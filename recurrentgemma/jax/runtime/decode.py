"""A model's steps as functions of its parameters and state, compiled with the state donated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from recurrentgemma.jax.cache import Cache
from recurrentgemma.jax.griffin import Griffin
from recurrentgemma.jax.runtime.compiler import compiler_options
from recurrentgemma.jax.runtime.trees import Params


class Functions(NamedTuple):
    """What runs on the device; a cache that goes in may be used up, but for `take`'s.

    Attributes:
      prefill: (params, cache, tokens [B, T], segment_pos [B, T]) to the cache after them.
      feed: (params, cache, tokens [B], segment_pos [B]) to logits [B, V] and the cache.
      score: (params, cache, tokens [B, T], segment_pos [B, T], targets [B, T]) to logits
        [B, T, V], the targets' log-probabilities [B, T] and the cache.
      take: (cache, rows) to the state of these rows.
    """

    prefill: Callable[..., Cache]
    feed: Callable[..., tuple[Array, Cache]]
    score: Callable[..., tuple[Array, Array, Cache]]
    take: Callable[..., Cache]


def functions(model: Griffin) -> Functions:
    """The steps as they are, not compiled."""

    def apply(params: Params, **kwargs: Any) -> tuple[Any, Any]:
        result: Any = model.apply({"params": params}, **kwargs)
        return result

    def prefill(params, cache, tokens, segment_pos):
        return apply(
            params, tokens=tokens, segment_pos=segment_pos, cache=cache, return_logits=False
        )[1]

    def feed(params, cache, tokens, segment_pos):
        logits, cache = apply(
            params, tokens=tokens[:, None], segment_pos=segment_pos[:, None], cache=cache
        )
        return logits[:, 0], cache

    def score(params, cache, tokens, segment_pos, targets):
        logits, cache = apply(params, tokens=tokens, segment_pos=segment_pos, cache=cache)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return logits, jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], cache

    def take(cache, rows):
        return jax.tree.map(lambda value: value[rows], cache)

    return Functions(prefill, feed, score, take)


def compiled(model: Griffin, platform: str) -> Functions:
    """Shared by all samplers: another of the same model and shapes compiles nothing."""
    return _compiled(cast(Any, model), platform)  # hashable, as pyright does not see


@functools.lru_cache
def _compiled(model: Griffin, platform: str) -> Functions:
    prefill, feed, score, take = functions(model)
    compile = functools.partial(
        jax.jit, donate_argnames=("cache",), compiler_options=compiler_options(platform)
    )
    return Functions(compile(prefill), compile(feed), compile(score), jax.jit(take))
