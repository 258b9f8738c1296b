"""How the next token is chosen: frozen, hashable strategies that both twins carry out."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; of equals the one with the lowest id."""


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A draw from softmax(logits / temperature), in float32, after cutting off unlikely tokens.

    Attributes:
      temperature: Above 0; lower is closer to greedy.
      top_k: Keep the k most likely tokens, of equals the lowest ids first; None keeps all.
      top_p: Of what `top_k` keeps, keep the fewest most likely tokens whose probabilities reach p,
        in (0, 1].

    Raises:
      ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature} "
                "(for the most likely token use Greedy)"
            )
        if self.top_k is not None and (isinstance(self.top_k, float) or self.top_k < 1):
            raise ValueError(f"top_k must be a positive integer, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


Sampling = Greedy | Categorical
