"""What one training step reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Batch(NamedTuple):
    """Rows of tokens, each with what follows it and how much that counts.

    Attributes:
      tokens: What the model reads.
      segment_pos: Position of each token in its document: 0 starts a document, so that several may
        be packed into a row; -1 is padding, which may only stand before a row's tokens.
      targets: The token that follows each; anything where its weight is 0.
      weights: What each target counts in the loss; 0 for what follows a document's last token,
        for padding and for prompts.
    """

    tokens: Int[np.ndarray, "b t"]
    segment_pos: Int[np.ndarray, "b t"]
    targets: Int[np.ndarray, "b t"]
    weights: Float[np.ndarray, "b t"]
