"""What each row of a batch asks for, as arrays that one compiled step reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.strategies import Categorical

_LEAST_WIDTH, _LEAST_STOPS, _LEAST_BIASES = 64, 4, 4


class RowSettings(NamedTuple):
    """How each row's next token is chosen: one array a setting, one entry a row.

    Attributes:
      temperature: [B] float32; 0 takes the most likely token.
      top_k: [B] int32; 0 keeps all tokens.
      top_p: [B] float32; 1 keeps all tokens.
      log_min_p: [B] float32; -inf keeps all tokens.
      penalty: [B] float32; 1 changes nothing.
      presence: [B] float32; 0 changes nothing.
      frequency: [B] float32; 0 changes nothing.
      biased_ids: [B, N] int32, the tokens whose logits have a bias; 0 fills the rest.
      biases: [B, N] float32; 0 fills the rest.
      stop_ids: [B, S] int32, the ids that end a row; -1 fills the rest.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    log_min_p: Any
    penalty: Any
    presence: Any
    frequency: Any
    biased_ids: Any
    biases: Any
    stop_ids: Any


class Variant(NamedTuple):
    """The parts that a step needs for a batch. Compiled steps differ in these alone.

    Attributes:
      plain: Whether a row draws from the whole vocabulary.
      width: How many of the most likely tokens are sorted; 0 where no row has `top_k` or `top_p`.
      penalised: Whether a row has a penalty or a bias.
      num_logprobs: How many of the likeliest tokens to report; None reports no log-probabilities.
      logits: Whether to return the logits.
    """

    plain: bool = False
    width: int = 0
    penalised: bool = False
    num_logprobs: int | None = None
    logits: bool = False


def row_settings(
    rows: Sequence[RowRequest],
    vocab_size: int,
    least_stops: int = _LEAST_STOPS,
    least_biases: int = _LEAST_BIASES,
) -> RowSettings:
    """The settings of all rows as NumPy arrays.

    Args:
      rows: What each row is asked to generate.
      vocab_size: Number of tokens.
      least_stops: The fewest columns of `stop_ids`.
      least_biases: The fewest columns of `biased_ids` and `biases`.
    """
    drawn = [row.sampling if isinstance(row.sampling, Categorical) else None for row in rows]
    stop_ids = np.full((len(rows), _bucket(max(len(r.stops.ids) for r in rows), least_stops)), -1)
    for row, request in enumerate(rows):
        stop_ids[row, : len(request.stops.ids)] = [*request.stops.ids]
    samplings = [row.sampling for row in rows]
    most = max(len(sampling.biases) for sampling in samplings)
    biased_ids = np.zeros((len(rows), _bucket(most, least_biases)), np.int32)
    biases = np.zeros(biased_ids.shape, np.float32)
    for row, sampling in enumerate(samplings):
        for place, (token, bias) in enumerate(sampling.biases):
            biased_ids[row, place], biases[row, place] = token, bias
    return RowSettings(
        np.array([s.temperature if s else 0 for s in drawn], np.float32),
        np.array([min(s.top_k or 0, vocab_size) if s else 0 for s in drawn], np.int32),
        np.array([s.top_p if s else 1 for s in drawn], np.float32),
        np.array([math.log(s.min_p) if s and s.min_p else -np.inf for s in drawn], np.float32),
        np.array([sampling.repetition_penalty for sampling in samplings], np.float32),
        np.array([sampling.presence_penalty for sampling in samplings], np.float32),
        np.array([sampling.frequency_penalty for sampling in samplings], np.float32),
        biased_ids,
        biases,
        stop_ids.astype(np.int32),
    )


def variant_of(
    rows: Sequence[RowRequest], vocab_size: int, num_logprobs: int | None, logits: bool
) -> Variant:
    """What a step needs for these rows."""
    drawn = [row.sampling for row in rows if isinstance(row.sampling, Categorical)]
    cut = [s for s in drawn if s.top_k is not None or s.top_p < 1]
    width = max((s.top_k or vocab_size for s in cut), default=0)
    return Variant(
        plain=len(cut) < len(drawn),
        width=min(_bucket(width, _LEAST_WIDTH), vocab_size) if cut else 0,
        penalised=any(row.sampling.repetition_penalty != 1 or row.sampling.adjusts for row in rows),
        num_logprobs=num_logprobs,
        logits=logits,
    )


def _bucket(count: int, least: int) -> int:
    """The least of `least`, 4 * `least`, 16 * `least`, ... that is no smaller than a count."""
    while least < count:
        least *= 4
    return least
