"""The input of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int

from recurrentgemma.common.errors import UserError
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

    @classmethod
    def from_labels(
        cls,
        input_ids: Any,
        labels: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        ignore: int = -100,
    ) -> Batch:
        """The batch that a collator of `transformers` means.

        Arrays are NumPy's or the framework's, [B, T + 1], or lists. The model reads all tokens but
        the last; the target of each is the label of the next.

        Args:
          input_ids: The tokens.
          labels: The tokens to learn, in their own places; `input_ids` if None.
          attention_mask: 0 at padding, on either side; None means no padding. A label at padding
            must be `ignore`.
          position_ids: The position of each token in its document, instead of a mask: for rows that
            hold several documents.
          ignore: The label that does not count.

        Raises:
          ValueError: There are both a mask and positions, or the shapes differ.
        """
        given = (input_ids, labels, attention_mask, position_ids)
        ids, labels, mask, places = map(_as_array, given)
        if mask is not None and places is not None:
            raise UserError("give attention_mask or position_ids, not both")
        labels = ids if labels is None else labels
        shapes = {tuple(z.shape) for z in (ids, labels, mask, places) if z is not None}
        if len(shapes) > 1 or ids.ndim != 2 or ids.shape[1] < 2:
            raise UserError(
                "input_ids, labels and their mask or positions must have one shape, (rows, tokens) "
                f"with at least two tokens, got {sorted(shapes)}"
            )
        if places is None:
            places = (ids == ids).cumsum(1) - 1
            if mask is not None:
                padding = (mask.cumsum(1) == 0).sum(1)  # before the first token
                places = (places - padding[:, None]).clip(min=-1)
        targets = labels[:, 1:]
        return cls(ids[:, :-1], places[:, :-1], targets, (targets != ignore) * 1.0)


def _as_array(values: Any) -> Any:
    """Lists as an array of NumPy; arrays of any framework as they are."""
    if values is None or hasattr(values, "cumsum"):
        return values
    import numpy as np

    return np.asarray(values)


def require_batch(batch: Any) -> Batch:
    """The batch, or a `ValueError` that says how to make one."""
    if not isinstance(batch, Batch):
        raise UserError(
            "a batch must be a Batch: Batch.from_labels(**collated) makes one of input_ids, labels "
            f"and attention_mask; got {type(batch).__name__}"
        )
    return batch


def batch_list(batches: Batch | Sequence[Batch]) -> list[Batch]:
    """One batch, or several, as a list; raises `ValueError` for what is no batch."""
    several = isinstance(batches, Iterable) and not isinstance(batches, Batch | Mapping)
    return [*map(require_batch, batches if several else [batches])]


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Raises `ValueError` for values that give no meaning, where arrays are NumPy's."""
    require_batch(batch)
    check_inputs(batch.tokens, batch.segment_pos, vocab_size)
    check_targets(batch.targets, batch.weights, vocab_size)
