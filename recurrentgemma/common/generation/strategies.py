"""How the next token is chosen: frozen, hashable strategies that both twins carry out.

Each row draws from a random stream of its own: one number a token, which depends on the row's seed
and the token's position alone. A row's draws depend neither on its neighbours nor on its place in
the batch, and the same seed draws the same in both frameworks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.scalars import make_plain

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Adjusted:
    """Changes to the logits after the repetition penalty, before a token is chosen.

    A logit becomes logit - presence_penalty [n > 0] - frequency_penalty n + logit_bias, where n
    counts the token among those that were generated so far.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_finite(name, getattr(self, name))
        bias = self.logit_bias
        pairs = tuple(sorted(bias.items() if isinstance(bias, Mapping) else bias))
        for token, value in pairs:
            if not _is_integer(token) or token < 0:
                raise UserError(f"logit_bias must have token ids, got {token!r}")
            _check_finite("logit_bias", value)
        object.__setattr__(self, "logit_bias", pairs)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The pairs of `logit_bias`, in order of id."""
        return cast(Any, self.logit_bias)

    def __repr__(self) -> str:
        """The fields that are not as they are by default."""
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        said = ", ".join(f"{name}={value}" for name, value, default in fields if value != default)
        return f"{type(self).__name__}({said})"

    @property
    def adjusts(self) -> bool:
        """Whether this changes a logit."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclasses.dataclass(frozen=True, repr=False)
class Greedy(_Adjusted):
    """The most likely token; among equals the one with the lowest id.

    Attributes:
      repetition_penalty: As in `Categorical`, and so are the other fields.

    Raises:
      ValueError: A value is out of range.
    """

    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_normal("repetition_penalty", self.repetition_penalty)


@dataclasses.dataclass(frozen=True, repr=False)
class Categorical(_Adjusted):
    """A draw from softmax(logits / temperature), in float32, after cutting off unlikely tokens.

    Attributes:
      temperature: Above 0; lower is closer to greedy. Like the penalty it must be a normal number
        of float32, from 1.18e-38 to 3.4e+38.
      top_k: Keep the k most likely tokens, among equals the lowest ids; None keeps all.
      top_p: Keep the fewest most likely tokens whose probabilities, among those that `top_k` keeps,
        reach p, in (0, 1].
      min_p: Keep the tokens at least this many times as likely as the likeliest, in [0, 1].
      repetition_penalty: Before all else, the logits of tokens that occur in the text are divided
        by this where they are positive, else multiplied by it; 1 changes nothing (arXiv 1909.05858,
        section 4.1).
      presence_penalty: Then this is taken from the logits of tokens that were generated so far.
      frequency_penalty: And this, as often as each was generated.
      logit_bias: And these numbers are added to the logits of tokens, by id.

    Raises:
      ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_normal("temperature", self.temperature, "; for the most likely token use Greedy")
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            raise UserError(f"top_k must be a positive integer, got {self.top_k}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], got {self.min_p}")
        _check_normal("repetition_penalty", self.repetition_penalty)


Sampling = Greedy | Categorical


def row_keys(seeds: Any, num_texts: int, num_samples: int = 1) -> list[np.ndarray]:
    """The key of each row's random stream.

    Args:
      seeds: One integer for all, from which each row makes its own, or one a text, in a sequence or
        an array of any framework: with its own seed a text draws alone what it draws in a batch.
      num_texts: Number of texts.
      num_samples: Rows of each text, which draw differently.

    Raises:
      ValueError: A seed is no integer, or the number of seeds and texts differ.
    """
    seeds = _plain(seeds)
    if _is_integer(seeds):
        pairs = [(seeds, row) for row in range(num_texts * num_samples)]
    elif isinstance(seeds, Sequence) and not isinstance(seeds, bytes | bytearray) and all(
        _is_integer(_plain(seed)) for seed in seeds
    ):  # fmt: skip
        if len(seeds) != num_texts:
            raise UserError(f"rng must have one seed a text, {num_texts}, got {len(seeds)}")
        pairs = [(seed, sample) for seed in seeds for sample in range(num_samples)]
    else:
        raise UserError(f"rng must be an integer or one a text, got {seeds!r}")
    return [
        np.random.SeedSequence([abs(int(seed)), int(seed < 0), row]).generate_state(2, np.uint64)
        for seed, row in pairs
    ]


def uniform(
    keys: Sequence[np.ndarray | None], positions: Sequence[int] | np.ndarray, steps: int = 1
) -> np.ndarray:
    """Numbers in (0, 1], [steps, B] float32: those of each row's position and the ones after it.

    A row without a key draws nothing and gets ones.
    """
    raw = np.full((steps, len(keys)), 2**64 - 1, np.uint64)
    for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
        if key is not None:  # four words a count, the first of which counts
            words = np.random.Philox(key=key, counter=int(position)).random_raw(4 * steps)
            raw[:, row] = words[::4]
    return ((raw >> np.uint64(40)) + 1).astype(np.float32) * 2**-24


def _check_normal(name: str, value: Any, advice: str = "") -> None:
    if not _is_number(value) or not _LEAST <= value <= _MOST:
        raise UserError(
            f"{name} must be above 0 and finite, got {value} "
            f"(in float32: from 1.18e-38 to 3.4e+38{advice})"
        )


def _check_finite(name: str, value: Any) -> None:
    if not _is_number(value) or not abs(value) <= _MOST:
        raise UserError(f"{name} must be finite, got {value!r}")


def _plain(value: Any) -> Any:
    """An array of any framework as numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)
