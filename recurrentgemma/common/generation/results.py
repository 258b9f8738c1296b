"""What a sampler returns, put together from a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from recurrentgemma.common.generation.engine import LogProbs
from recurrentgemma.common.generation.loop import Generation
from recurrentgemma.common.model.state import State

_Array = TypeVar("_Array")


class SamplerOutput(NamedTuple, Generic[_Array]):
    """What a sampler returns, one entry a row.

    Attributes:
      text: The generated text, with `echo` behind the prompt's.
      tokens: The generated token ids, also the one that stopped the row; with `echo` behind the
        prompt's.
      logits: [N, V], empty unless asked for. A generated token has the logits that it was chosen
        from; with `echo` a prompt's token has, as published, those that come after it.
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


def collected(generation: Generation) -> SamplerOutput[Any]:
    """Runs a generation to its end; the output has all but the state."""
    engine, variant = generation.engine, generation.variant
    rows = range(len(generation.texts))
    texts: list[list[str]] = [[] for _ in rows]
    all_logits, all_logprobs = [], []
    for step in generation:
        for row in np.flatnonzero(step.active):
            texts[row].append(step.texts[row])
        if variant.logits:
            all_logits.append(engine.on_host(step.logits))
        if step.logprobs is not None:
            all_logprobs.append(step.logprobs)
    tokens = [np.array(row, np.int32) for row in generation.generated]
    logits, logprobs = [], None
    if variant.logits:
        empty = np.zeros((0, engine.config.vocab_size), np.float32)
        of_rows = [[empty, *(z[row, None] for z in all_logits[: len(tokens[row])])]
                   for row in rows]  # fmt: skip
        logits = [engine.on_device(np.concatenate(parts)) for parts in of_rows]
    if variant.num_logprobs is not None:
        logprobs = [_logprobs_of_row(all_logprobs, row, len(tokens[row])) for row in rows]
    return SamplerOutput(
        text=["".join(parts) for parts in texts],
        tokens=[engine.on_device(row) for row in tokens],
        logits=logits,
        logprobs=logprobs,
        finish_reasons=[text.finish_reason for text in generation.texts],
    )


def _logprobs_of_row(steps: Sequence[LogProbs], row: int, length: int) -> LogProbs:
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
