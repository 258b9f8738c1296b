"""Choosing tokens from logits, in float32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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

    tokens: Int[Tensor, " b"]
    logprobs: Float[Tensor, " b"] | None
    top_tokens: Int[Tensor, "b n"] | None
    top_logprobs: Float[Tensor, "b n"] | None


def choose(
    sampling: Sampling,
    logits: Float[Tensor, "b v"],
    uniform: Float[Tensor, " b"],
    seen: Bool[Tensor, "b v"] | None = None,
    num_logprobs: int | None = None,
) -> Choice:
    """A token a row, and the log-probabilities of it and of the `num_logprobs` likeliest."""
    tokens = draw(sampling, logits, uniform, seen)
    if num_logprobs is None:
        return Choice(tokens, None, None, None)
    logprobs = logits.float().log_softmax(-1)
    top_logprobs, top_tokens = top(logprobs, num_logprobs)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    return Choice(tokens, chosen, top_tokens, top_logprobs)


def draw(
    sampling: Sampling,
    logits: Float[Tensor, "b v"],
    uniform: Float[Tensor, " b"],
    seen: Bool[Tensor, "b v"] | None = None,
) -> Int[Tensor, " b"]:
    """A token a row: the first at which the cumulated probabilities reach a number in (0, 1].

    Args:
      sampling: How tokens are chosen.
      logits: What to choose by.
      uniform: The numbers.
      seen: The tokens that the repetition penalty is for.
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        most = torch.finfo(torch.float32).max  # infinities have no softmax
        penalised = penalised.clamp(-most, most)
        logits = torch.where(seen, penalised, logits)
    if isinstance(sampling, Greedy):
        return logits.argmax(-1)
    values, ids = cut_off(sampling, logits)
    weights = torch.exp(values)
    # Rounding must neither choose a token of weight 0 nor leave none to choose.
    reached = torch.where(weights > 0, weights.cumsum(-1), 0)
    goal = uniform[:, None] * reached.amax(-1, keepdim=True)
    choice = (reached >= goal).int().argmax(-1, keepdim=True)
    return choice[:, 0] if ids is None else ids.gather(-1, choice)[:, 0]


def cut_off(
    sampling: Categorical, logits: Float[Tensor, "b v"]
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"] | None]:
    """The logits that `top_k`, `top_p` and `min_p` keep, others at -inf, and their token ids.

    They are divided by the temperature, the highest is 0, and they come most likely first; without
    `top_k` and `top_p` in the order of the vocabulary and without ids.
    """
    values, ids = logits, None
    if sampling.top_k is not None or sampling.top_p < 1:
        values, ids = top(logits, min(sampling.top_k or logits.shape[1], logits.shape[1]))
    values = (values - values.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_p < 1:
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        kept = before < sampling.top_p
        kept[:, 0] = True
        values = torch.where(kept, values, -torch.inf)
    if sampling.min_p > 0:
        values = torch.where(values >= math.log(sampling.min_p), values, -torch.inf)
    return values, ids


def top(values: Float[Tensor, "b v"], k: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The k largest values and their places, largest first, of equals the first.

    `torch.topk` chooses any of equals, and a stable sort of all is slow.
    """
    least = values.topk(max(k, 1)).values[:, -1:]
    above, equal = values > least, values == least
    kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    places = kept.nonzero()[:, 1].reshape(len(values), k)
    ordered, order = values.gather(-1, places).sort(dim=-1, descending=True, stable=True)
    return ordered, places.gather(-1, order)
