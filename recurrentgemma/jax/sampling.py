"""Choosing tokens from logits, in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recurrentgemma.common.generation.strategies import Categorical, Greedy, Sampling

__all__ = ["Categorical", "Choice", "Greedy", "Sampling", "choose", "cut_off", "draw"]


class Choice(NamedTuple):
    """A token a row, with what was asked for of the model's log-probabilities.

    Attributes:
      tokens: Token ids.
      logprobs: Their log-probabilities; None if not asked for.
      top_tokens: The likeliest tokens, most likely first; None likewise.
      top_logprobs: Their log-probabilities; None likewise.
    """

    tokens: Int[Array, " b"]
    logprobs: Float[Array, " b"] | None
    top_tokens: Int[Array, "b n"] | None
    top_logprobs: Float[Array, "b n"] | None


def choose(
    sampling: Sampling,
    logits: Float[Array, "b v"],
    uniform: Float[Array, " b"],
    seen: Bool[Array, "b v"] | None = None,
    num_logprobs: int | None = None,
) -> Choice:
    """A token a row, and the log-probabilities of it and of the `num_logprobs` likeliest."""
    tokens = draw(sampling, logits, uniform, seen)
    if num_logprobs is None:
        return Choice(tokens, None, None, None)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, num_logprobs)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return Choice(tokens, chosen, top_tokens, top_logprobs)


def draw(
    sampling: Sampling,
    logits: Float[Array, "b v"],
    uniform: Float[Array, " b"],
    seen: Bool[Array, "b v"] | None = None,
) -> Int[Array, " b"]:
    """A token a row: the first at which the cumulated probabilities reach a number in (0, 1].

    Args:
      sampling: How tokens are chosen.
      logits: What to choose by.
      uniform: The numbers.
      seen: The tokens that the repetition penalty is for.
    """
    logits = logits.astype(jnp.float32)
    if seen is not None:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        most = float(jnp.finfo(jnp.float32).max)  # infinities have no softmax
        penalised = penalised.clip(-most, most)
        logits = jnp.where(seen, penalised, logits)
    if isinstance(sampling, Greedy):
        return logits.argmax(-1)
    values, ids = cut_off(sampling, logits)
    weights = jnp.exp(values)
    # Rounding must neither choose a token of weight 0 nor leave none to choose.
    reached = jnp.where(weights > 0, weights.cumsum(-1), 0)
    goal = uniform[:, None] * reached.max(-1, keepdims=True)
    choice = (reached >= goal).argmax(-1, keepdims=True)
    return choice[:, 0] if ids is None else jnp.take_along_axis(ids, choice, -1)[:, 0]


def cut_off(
    sampling: Categorical, logits: Float[Array, "b v"]
) -> tuple[Float[Array, "b k"], Int[Array, "b k"] | None]:
    """The logits that `top_k`, `top_p` and `min_p` keep, others at -inf, and their token ids.

    They are divided by the temperature, the highest is 0, and they come most likely first; without
    `top_k` and `top_p` in the order of the vocabulary and without ids.
    """
    values, ids = logits, None
    if sampling.top_k is not None or sampling.top_p < 1:
        # Equals come in order of id.
        values, ids = jax.lax.top_k(logits, min(sampling.top_k or logits.shape[1], logits.shape[1]))
    values = (values - values.max(-1, keepdims=True)) / sampling.temperature
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(values)
        before = probabilities.cumsum(-1) - probabilities
        kept = (before < sampling.top_p).at[:, 0].set(True)
        values = jnp.where(kept, values, -jnp.inf)
    if sampling.min_p > 0:
        values = jnp.where(values >= jnp.log(jnp.float32(sampling.min_p)), values, -jnp.inf)
    return values, ids
