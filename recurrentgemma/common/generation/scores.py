"""How likely a model finds a given text."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """The log-probability of each token of a text after those before it.

    Attributes:
      tokens: The text's tokens, without the BOS before them.
      logprobs: log p(token | BOS, the tokens before), natural, float32, one a token.
    """

    tokens: list[int]
    logprobs: np.ndarray

    @property
    def total(self) -> float:
        """The text's log-probability, in nats."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise a token; NaN for a text without tokens."""
        return math.exp(-self.total / len(self.tokens)) if self.tokens else math.nan
