"""Choosing tokens from logits, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recurrentgemma.common.generation.engine import LogProbs, Sampled
from recurrentgemma.common.generation.settings import RowSettings, Variant
from recurrentgemma.common.generation.strategies import Categorical, Greedy
from recurrentgemma.torch.runtime.known import is_known

__all__ = ["Categorical", "Greedy", "choose", "cut_off", "draw"]


def choose(
    variant: Variant,
    settings: RowSettings,
    logits: Float[Tensor, "b v"],
    numbers: Float[Tensor, " b"],
    seen: Int[Tensor, "b v"] | None = None,
) -> Sampled:
    """A token a row, and the log-probabilities that the variant asks for.

    The token is -1 where no token can be chosen: where a logit is NaN or the largest is infinite.
    """
    tokens = draw(variant, settings, logits, numbers, seen)
    tokens = torch.where(torch.isfinite(logits.amax(-1)), tokens, -1)
    if variant.num_logprobs is None:
        return Sampled(tokens)
    logprobs = logits.float().log_softmax(-1)
    top_logprobs, top_tokens = top(logprobs, variant.num_logprobs)
    chosen = logprobs.gather(-1, tokens[:, None].clamp(min=0))[:, 0]
    return Sampled(tokens, LogProbs(chosen, top_tokens, top_logprobs))


def draw(
    variant: Variant,
    settings: RowSettings,
    logits: Float[Tensor, "b v"],
    numbers: Float[Tensor, " b"],
    seen: Int[Tensor, "b v"] | None = None,
) -> Int[Tensor, " b"]:
    """A token a row: the likeliest, or the first at which the cumulated weights reach a number.

    Args:
      variant: Which of this the batch needs.
      settings: How each row chooses.
      logits: What to choose by.
      numbers: The number for each row, in (0, 1], a share of all weights.
      seen: How each row has each token, for the penalties; see `Engine.choose`.
    """
    logits = logits.float()
    if seen is not None:
        penalty, count = settings.penalty[:, None], seen // 2
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where((seen > 0) & (penalty != 1), penalised, logits)
        taken = settings.presence[:, None] * (count > 0) + settings.frequency[:, None] * count
        logits = (logits - taken).scatter_add(-1, settings.biased_ids.long(), settings.biases)
        most = torch.finfo(torch.float32).max  # infinities have no softmax
        logits = logits.clamp(-most, most)
    tokens = logits.argmax(-1)
    draws = settings.temperature > 0
    is_cut = (settings.top_k > 0) | (settings.top_p < 1)
    if variant.plain:
        values = cut_off(settings, logits)
        tokens = torch.where(draws & ~is_cut, _pick(values, numbers), tokens)
    if variant.width:
        values, ids = top(logits, variant.width)
        values = cut_off(settings, values, ordered=True)
        drawn = ids.gather(-1, _pick(values, numbers)[:, None])[:, 0]
        tokens = torch.where(draws & is_cut, drawn, tokens)
    return tokens


def cut_off(
    settings: RowSettings, logits: Float[Tensor, "b k"], ordered: bool = False
) -> Float[Tensor, "b k"]:
    """The logits that `top_k`, `top_p` and `min_p` keep, others at -inf.

    They are divided by the temperature, and the highest is 0. `top_k` and `top_p` count only where
    the logits are `ordered`, most likely first.
    """
    if ordered:
        k, place = settings.top_k[:, None], torch.arange(logits.shape[1], device=logits.device)
        logits = torch.where((place < k) | (k == 0), logits, -torch.inf)
    temperature = torch.where(settings.temperature > 0, settings.temperature, 1)
    values = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    if ordered:
        weights, p = torch.exp(values), settings.top_p[:, None]
        before = weights.cumsum(-1) - weights
        kept = (before < p * _cumulated(weights).amax(-1, keepdim=True)) | (p == 1)
        kept[:, 0] = True
        values = torch.where(kept, values, -torch.inf)
    return torch.where(values >= settings.log_min_p[:, None], values, -torch.inf)


def top(values: Float[Tensor, "b v"], k: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The k largest values and their places, largest first, among equals in order of place.

    `torch.topk` chooses any among equals, and a stable sort of all values is slow. The host never
    waits for the device here, as it would for `nonzero`.
    """
    if k == values.shape[1]:
        ordered, places = values.sort(dim=-1, descending=True, stable=True)
        return ordered, places
    found = values.topk(max(k, 1))
    least = found.values[:, -1:]
    if is_known(values) and not ((values == least).sum(-1) > (found.values == least).sum(-1)).any():
        places = found.indices[:, :k].sort(-1).values  # no equal one was left out
        ordered, order = values.gather(-1, places).sort(dim=-1, descending=True, stable=True)
        return ordered, places.gather(-1, order)
    above, equal = values > least, values == least
    kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    rank = torch.where(kept, kept.cumsum(-1) - 1, k)
    every = torch.arange(values.shape[1], device=values.device).expand_as(rank)
    places = rank.new_zeros(len(rank), k + 1).scatter_(1, rank, every)[:, :k]
    ordered, order = values.gather(-1, places).sort(dim=-1, descending=True, stable=True)
    return ordered, places.gather(-1, order)


def _pick(values: Float[Tensor, "b k"], numbers: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The place at which the cumulated weights reach a share of their sum."""
    reached = _cumulated(torch.exp(values))
    return (reached >= numbers[:, None] * reached.amax(-1, keepdim=True)).int().argmax(-1)


def _cumulated(weights: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """The cumulated weights; 0 at a weight of 0, which rounding must not choose.

    What comes behind the last weight changes no bit: rows cut off at different places agree.
    """
    return torch.where(weights > 0, weights.cumsum(-1), 0)
