"""Choosing tokens from logits, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recurrentgemma.common.sampling import Categorical, Greedy, Sampling

__all__ = ["Categorical", "Greedy", "Sampling", "cut_off", "draw"]


def draw(
    sampling: Sampling, logits: Float[Tensor, "b v"], generators: list[torch.Generator]
) -> Int[Tensor, " b"]:
    """A token a row, each row from its own generator."""
    if isinstance(sampling, Greedy):
        return logits.argmax(-1)
    values, ids = cut_off(sampling, logits.float() / sampling.temperature)
    # The largest of logit + Gumbel noise is a draw from the softmax.
    rows = zip(values, generators, strict=True)
    noise = torch.stack([torch.empty_like(row).exponential_(generator=g) for row, g in rows])
    choice = (values - noise.log()).argmax(-1, keepdim=True)
    return choice[:, 0] if ids is None else ids.gather(-1, choice)[:, 0]


def cut_off(
    sampling: Categorical, logits: Float[Tensor, "b v"]
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"] | None]:
    """The logits that `top_k` and `top_p` keep, others at -inf, and their token ids.

    They come most likely first; with nothing to cut off, as they are and without ids.
    """
    if sampling.top_k is None and sampling.top_p == 1:
        return logits, None
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        values, ids = values[:, : sampling.top_k], ids[:, : sampling.top_k]
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    if sampling.top_p < 1:
        kept = before < sampling.top_p
        kept[:, 0] = True
        values = torch.where(kept, values, -torch.inf)
    return values, ids
