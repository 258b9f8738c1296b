"""What each row is asked to generate, from arguments for all prompts or one a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.generation.stops import Stops, checked_ids, checked_strings
from recurrentgemma.common.generation.strategies import Categorical, Greedy, Sampling
from recurrentgemma.common.scalars import plain

Steps = int | Sequence[int]
Samplings = Sampling | Sequence[Sampling] | None
StopStrings = str | Iterable[str] | Sequence[Iterable[str]]
StopIds = Iterable[int] | Sequence[Iterable[int]]


class Options(TypedDict, total=False):
    """What a text may be continued with; `BaseSampler.__call__` explains each."""

    rng: Any
    end_sampling_at_eos_token: bool
    sampling: Samplings
    stop_strings: StopStrings
    stop_ids: StopIds
    num_logprobs: int | None


class RowRequest(NamedTuple):
    """What one row is asked to generate.

    Attributes:
      steps: At most this many tokens.
      sampling: How they are chosen.
      stops: What ends the row.
      key: The row's random stream; None where nothing is drawn.
    """

    steps: int
    sampling: Sampling
    stops: Stops
    key: np.ndarray | None = None


def row_requests(
    num_texts: int,
    num_samples: int,
    *,
    steps: Steps,
    sampling: Sampling | Sequence[Sampling],
    stop_strings: StopStrings,
    stop_ids: StopIds,
    always: Mapping[int, str],
    vocab_size: int,
) -> list[RowRequest]:
    """The requests of `num_samples` rows for each text.

    Args:
      num_texts: Number of texts.
      num_samples: Rows for each text.
      steps: At most this many tokens a row; a number, or one a text.
      sampling: A strategy, or one a text.
      stop_strings: Strings that end a row, or a list of lists, one a text.
      stop_ids: Tokens that end a row, or a list of lists, one a text.
      always: Tokens that end every row, each with its reason.
      vocab_size: Number of tokens.

    Raises:
      ValueError: An argument is out of range.
    """
    steps = plain(steps)
    several = isinstance(steps, list | tuple) or hasattr(steps, "shape")
    all_steps = _each("total_generation_steps", steps, num_texts, several)
    samplings = _each("sampling", sampling, num_texts, isinstance(sampling, list | tuple))
    all_ids = _each("stop_ids", stop_ids, num_texts, _is_nested(stop_ids))
    all_strings = _each("stop_strings", stop_strings, num_texts, _is_nested(stop_strings))
    rows = []
    for limit, strategy, ids, strings in zip(
        all_steps, samplings, all_ids, all_strings, strict=True
    ):
        if not isinstance(strategy, Greedy | Categorical):
            raise UserError(f"sampling must be Greedy or Categorical, got {strategy!r}")
        outside = [token for token, _ in strategy.biases if token >= vocab_size]
        if outside:
            raise UserError(
                f"logit_bias must have tokens of the vocabulary of {vocab_size}, got {outside[0]}"
            )
        reasons = dict.fromkeys(checked_ids(ids, vocab_size), "stop_id") | {**always}
        stops = Stops(reasons, checked_strings(strings))
        most = checked_integer("total_generation_steps", limit, least=0)
        rows += [RowRequest(most, strategy, stops)] * num_samples
    return rows


def checked_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer within bounds.

    Raises:
      ValueError: It is no integer, or out of bounds.
    """
    within = f"of at least {least}" if most is None else f"from {least} to {most}"
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least or (
        most is not None and number > most
    ):  # fmt: skip
        raise UserError(f"{name} must be an integer {within}, got {value!r}")
    return number


def _each(name: str, value: Any, num_texts: int, several: bool) -> list[Any]:
    """A value for each text: the same one, or the one in its place if there are `several`."""
    if not several:
        return [value] * num_texts
    if len(value) != num_texts:
        raise UserError(
            f"{name} must be one for all prompts or one a prompt, {num_texts}, got {len(value)}"
        )
    return [*value]


def _is_nested(values: Any) -> bool:
    """Whether it is a list of lists."""
    groups = list | tuple | set | frozenset
    return isinstance(values, list | tuple) and any(isinstance(group, groups) for group in values)
