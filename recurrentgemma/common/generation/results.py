"""What a sampler returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from recurrentgemma.common.generation.engine import LogProbs
from recurrentgemma.common.model.state import State

_Array = TypeVar("_Array")


class SamplerOutput(NamedTuple, Generic[_Array]):
    """What a sampler returns, one entry a row.

    Attributes:
      text: The generated text, with `echo` behind the prompt's.
      tokens: The generated token ids, also the one that stopped the row; with `echo` behind the
        prompt's.
      logits: `logits[i]` scores `tokens[i]`, [N, V], with zeros for a prompt's first token, which
        nothing scores; empty unless asked for.
      logprobs: Log-probabilities of the generated tokens; None unless asked for.
      finish_reasons: "eos", "end_of_turn", "stop_id", "stop_string", or "length".
      state: The state after all rows, to go on from; `generate` alone returns it.
    """

    text: list[str]
    tokens: list[_Array]
    logits: Sequence[_Array] = ()
    logprobs: list[LogProbs] | None = None
    finish_reasons: list[str] | None = None
    state: State | None = None


def logprobs_of_row(steps: Sequence[LogProbs], row: int, length: int) -> LogProbs:
    """One row's log-probabilities in its first `length` places, [N] and [N, n]."""
    chosen, top_tokens, top = (
        np.array([step[part][row] for step in steps[:length]]) for part in range(3)
    )
    shape = (length, steps[0].top.shape[1] if steps else 0)
    return LogProbs(
        chosen.astype(np.float32),
        top_tokens.astype(np.int32).reshape(shape),
        top.astype(np.float32).reshape(shape),
    )
