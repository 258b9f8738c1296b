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
    seen: Bool[Array, "b v"] | None = None,
) -> Sampled:
    """A token a row, and the log-probabilities that the variant asks for."""
    tokens = draw(variant, settings, logits, numbers, seen)
    if variant.num_logprobs is None:
        return Sampled(tokens)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, variant.num_logprobs)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return Sampled(tokens, LogProbs(chosen, top_tokens, top_logprobs))


def draw(
    variant: Variant,
    settings: RowSettings,
    logits: Float[Array, "b v"],
    numbers: Float[Array, " b"],
    seen: Bool[Array, "b v"] | None = None,
) -> Int[Array, " b"]:
    """A token a row: the likeliest, or the first at which the cumulated weights reach a number.

    Args:
      variant: Which of this the batch needs.
      settings: How each row chooses.
      logits: What to choose by.
      numbers: The number for each row, in (0, 1], a share of all weights.
      seen: The tokens that the repetition penalty is for.
    """
    logits = logits.astype(jnp.float32)
    if seen is not None:
        penalty = settings.penalty[:, None]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        most = float(jnp.finfo(jnp.float32).max)  # infinities have no softmax
        logits = jnp.where(seen & (penalty != 1), penalised.clip(-most, most), logits)
    tokens = logits.argmax(-1)
    draws = settings.temperature > 0
    is_cut = (settings.top_k > 0) | (settings.top_p < 1)
    if variant.plain:
        values, _ = cut_off(settings, logits)
        tokens = jnp.where(draws & ~is_cut, _pick(values, numbers), tokens)
    if variant.width:
        values, ids = cut_off(settings, logits, variant.width)
        drawn = jnp.take_along_axis(ids, _pick(values, numbers)[:, None], -1)[:, 0]
        tokens = jnp.where(draws & is_cut, drawn, tokens)
    return tokens


def cut_off(
    settings: RowSettings, logits: Float[Array, "b v"], width: int = 0
) -> tuple[Float[Array, "b k"], Int[Array, "b k"] | None]:
    """The logits that `top_k`, `top_p` and `min_p` keep, others at -inf, and their token ids.

    They are divided by the temperature, and the highest is 0. The `width` most likely tokens come,
    most likely first; where it is 0 all come in the order of the vocabulary, without ids, and
    `top_k` and `top_p` do not count.
    """
    values, ids = logits, None
    if width:
        values, ids = jax.lax.top_k(logits, width)  # equals come in order of id
        kept = settings.top_k[:, None] > jnp.arange(width)
        values = jnp.where(kept | (settings.top_k == 0)[:, None], values, -jnp.inf)
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1)
    values = (values - values.max(-1, keepdims=True)) / temperature[:, None]
    if width:
        weights = jnp.exp(values)
        before = weights.cumsum(-1) - weights
        share = settings.top_p[:, None] * _cumulated(weights).max(-1, keepdims=True)
        kept = ((before < share) | (settings.top_p == 1)[:, None]).at[:, 0].set(True)
        values = jnp.where(kept, values, -jnp.inf)
    return jnp.where(values >= settings.log_min_p[:, None], values, -jnp.inf), ids


def _pick(values: Float[Array, "b k"], numbers: Float[Array, " b"]) -> Int[Array, " b"]:
    """The place at which the cumulated weights reach a share of their sum."""
    reached = _cumulated(jnp.exp(values))
    return (reached >= numbers[:, None] * reached.max(-1, keepdims=True)).argmax(-1)


def _cumulated(weights: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """The cumulated weights; 0 at a weight of 0, which rounding must not choose.

    What comes behind the last weight changes no bit: rows cut off at different places agree.
    """
    return jnp.where(weights > 0, weights.cumsum(-1), 0)
