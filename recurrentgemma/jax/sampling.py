"""Choosing tokens from logits, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recurrentgemma.common.sampling import Categorical, Greedy, Sampling

__all__ = ["Categorical", "Greedy", "Sampling", "cut_off", "draw"]


def draw(
    sampling: Sampling, logits: Float[Array, "b v"], keys: Array, step: Int[Array, ""] | int
) -> Int[Array, " b"]:
    """A token a row, each row from its own key and the step."""
    if isinstance(sampling, Greedy):
        return logits.argmax(-1)
    values, ids = cut_off(sampling, logits.astype(jnp.float32) / sampling.temperature)
    # The largest of logit + Gumbel noise is a draw from the softmax.
    noise = jax.vmap(
        lambda key: jax.random.gumbel(jax.random.fold_in(key, step), values.shape[1:])
    )(keys)
    choice = (values + noise).argmax(-1, keepdims=True)
    return choice[:, 0] if ids is None else jnp.take_along_axis(ids, choice, -1)[:, 0]


def cut_off(
    sampling: Categorical, logits: Float[Array, "b v"]
) -> tuple[Float[Array, "b k"], Int[Array, "b k"] | None]:
    """The logits that `top_k` and `top_p` keep, others at -inf, and their token ids.

    They come most likely first; with nothing to cut off, as they are and without ids.
    """
    if sampling.top_k is None and sampling.top_p == 1:
        return logits, None
    # Both keep equals in order of id.
    values, ids = jax.lax.top_k(logits, min(sampling.top_k or logits.shape[1], logits.shape[1]))
    probabilities = jax.nn.softmax(values)
    before = probabilities.cumsum(-1) - probabilities
    if sampling.top_p < 1:
        kept = (before < sampling.top_p).at[:, 0].set(True)
        values = jnp.where(kept, values, -jnp.inf)
    return values, ids
