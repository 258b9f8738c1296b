"""The input of a training step."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Int

from recurrentgemma.common.model.inputs import check_inputs, check_targets


class Batch(NamedTuple):
    """Rows of tokens, each token with a target and the weight of that target.

    Arrays are NumPy's or the framework's, on any device.

    Attributes:
      tokens: The tokens that the model reads.
      segment_pos: The position of each token in its document. 0 starts a document, so that a row
        may hold several; -1 is padding, which may only come before a row's tokens.
      targets: The token that follows each one; any value where its weight is 0.
      weights: The weight of each target in the loss; 0 after a document's last token, at padding
        and within prompts.
    """

    tokens: Int[Any, "b t"]
    segment_pos: Int[Any, "b t"]
    targets: Int[Any, "b t"]
    weights: Float[Any, "b t"]


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Raises `ValueError` for values that give no meaning, where arrays are NumPy's."""
    check_inputs(batch.tokens, batch.segment_pos, vocab_size)
    check_targets(batch.targets, batch.weights, vocab_size)
