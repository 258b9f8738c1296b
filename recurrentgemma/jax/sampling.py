"""Choosing tokens from logits, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recurrentgemma.common.generation.engine import LogProbs, Sampled
from recurrentgemma.common.generation.settings import RowSettings, Variant
from recurrentgemma.common.generation.strategies import Categorical, Greedy

__all__ = ["Categorical", "Greedy", "choose", "cut_off", "draw"]


def choose(
    variant: Variant,
    settings: RowSettings,
    logits: Float[Array, "b v"],
    numbers: Float[Array, " b"],
    seen: Int[Array, "b v"] | None = None,
) -> Sampled:
    """A token a row, and the log-probabilities that the variant asks for.

    The token is -1 where no token can be chosen: where a logit is NaN or the largest is infinite.
    """
    tokens = draw(variant, settings, logits, numbers, seen)
    tokens = jnp.where(jnp.isfinite(logits.max(-1)), tokens, -1)
    if variant.num_logprobs is None:
        return Sampled(tokens)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    top_logprobs, top_tokens = top(logprobs, variant.num_logprobs)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return Sampled(tokens, LogProbs(chosen, top_tokens, top_logprobs))


def draw(
    variant: Variant,
    settings: RowSettings,
    logits: Float[Array, "b v"],
    numbers: Float[Array, " b"],
    seen: Int[Array, "b v"] | None = None,
) -> Int[Array, " b"]:
    """A token a row: the likeliest, or the first at which the cumulated weights reach a number.

    Args:
      variant: Which of this the batch needs.
      settings: How each row chooses.
      logits: What to choose by.
      numbers: The number for each row, in (0, 1], a share of all weights.
      seen: How each row has each token, for the penalties; see `Engine.choose`.
    """
    logits = logits.astype(jnp.float32)
    if seen is not None:
        penalty, count = settings.penalty[:, None], seen // 2
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where((seen > 0) & (penalty != 1), penalised, logits)
        taken = settings.presence[:, None] * (count > 0) + settings.frequency[:, None] * count
        rows = jnp.arange(len(logits))[:, None]
        logits = (logits - taken).at[rows, settings.biased_ids].add(settings.biases)
        most = float(jnp.finfo(jnp.float32).max)  # infinities have no softmax
        logits = logits.clip(-most, most)
    tokens = _first(logits == logits.max(-1, keepdims=True))
    draws = settings.temperature > 0
    is_cut = (settings.top_k > 0) | (settings.top_p < 1)
    if variant.plain:
        values = cut_off(settings, logits)
        tokens = jnp.where(draws & ~is_cut, _pick(values, numbers), tokens)
    if variant.width:
        values, ids = top(logits, variant.width)
        values = cut_off(settings, values, ordered=True)
        drawn = jnp.take_along_axis(ids, _pick(values, numbers)[:, None], -1)[:, 0]
        tokens = jnp.where(draws & is_cut, drawn, tokens)
    return tokens


def cut_off(
    settings: RowSettings, logits: Float[Array, "b k"], ordered: bool = False
) -> Float[Array, "b k"]:
    """The logits that `top_k`, `top_p` and `min_p` keep, others at -inf.

    They are divided by the temperature, and the highest is 0. `top_k` and `top_p` count only where
    the logits are `ordered`, most likely first.
    """
    if ordered:
        k = settings.top_k[:, None]
        logits = jnp.where((jnp.arange(logits.shape[1]) < k) | (k == 0), logits, -jnp.inf)
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1)
    values = (logits - logits.max(-1, keepdims=True)) / temperature[:, None]
    if ordered:
        weights, p = jnp.exp(values), settings.top_p[:, None]
        before = weights.cumsum(-1) - weights
        kept = (before < p * _cumulated(weights).max(-1, keepdims=True)) | (p == 1)
        values = jnp.where(kept.at[:, 0].set(True), values, -jnp.inf)
    return jnp.where(values >= settings.log_min_p[:, None], values, -jnp.inf)


def top(values: Float[Array, "b v"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k largest values and their places, largest first, among equals in order of place."""
    values, places = jax.lax.top_k(values, k)
    return values, places


def _pick(values: Float[Array, "b k"], numbers: Float[Array, " b"]) -> Int[Array, " b"]:
    """The place at which the cumulated weights reach a share of their sum."""
    reached = _cumulated(jnp.exp(values))
    return _first(reached >= numbers[:, None] * reached.max(-1, keepdims=True))


def _first(found: Bool[Array, "b k"]) -> Int[Array, " b"]:
    """The first place in each row where something is found; argmax takes XLA 7 times as long."""
    return jnp.where(found, jnp.arange(found.shape[1]), found.shape[1] - 1).min(-1)


def _cumulated(weights: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """The cumulated weights; 0 at a weight of 0, which rounding must not choose.

    What comes behind the last weight changes no bit: rows cut off at different places agree.
    """
    return jnp.where(weights > 0, weights.cumsum(-1), 0)
