"""The comparison of two models, tensor by tensor, and its verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from recurrentgemma.common.errors import MismatchError
from recurrentgemma.common.model.activations import activation_names
from recurrentgemma.common.model.config import Config
from recurrentgemma.parity.batches import ParityBatch
from recurrentgemma.parity.budget import Error, compare_tensors
from recurrentgemma.parity.models import ComparedModel
from recurrentgemma.parity.reading import CASES, Reading, read


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of both models.

    Attributes:
      kind: "parameter", "activation", "state" or "gradient".
      name: Its name.
      case: One of `reading.CASES`; empty for parameters and gradients.
      error: The error in the dtype of the comparison.
      wide: The error in the widest dtype that both models have.
      dtypes: The dtypes in which the two models returned it.
    """

    kind: str
    name: str
    case: str
    error: Error
    wide: Error
    dtypes: tuple[str, str]

    @property
    def share(self) -> float:
        """The part of its budget that it takes; infinite if the dtypes differ."""
        if self.dtypes[0] != self.dtypes[1]:
            return math.inf
        return max(self.error.share, self.wide.share)

    @property
    def within(self) -> bool:
        """Whether the models agree on it."""
        return self.share <= 1


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
      dtype: The dtype of the comparison.
      wide: The widest dtype that both models have.
      rows: Every tensor in the order of the forward pass, case by case, the gradients last.
      argmax_agreement: The part of all places where both models rank the same token first.
      kl_divergence: The mean over all places of KL(first || second), between the next-token
        distributions of the two models, in nats.
      greedy_agreement: How many tokens of each row's continuation agree before the first that
        differs.
      num_greedy: The length of the continuations.
    """

    dtype: str
    wide: str
    rows: tuple[Row, ...]
    argmax_agreement: float
    kl_divergence: float
    greedy_agreement: tuple[int, ...]
    num_greedy: int

    @property
    def within(self) -> bool:
        """Whether every tensor is within its budget."""
        return all(row.within for row in self.rows)

    @property
    def first_beyond(self) -> Row | None:
        """The first tensor that is beyond its budget."""
        return next((row for row in self.rows if not row.within), None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        first = self.first_beyond
        return {
            "within_budget": self.within,
            "first_beyond": None if first is None else {"name": first.name, "case": first.case},
            "dtype": self.dtype,
            "wide_dtype": self.wide,
            "argmax_agreement": self.argmax_agreement,
            "kl_divergence": _finite(self.kl_divergence),
            "greedy_agreement": list(self.greedy_agreement),
            "num_greedy": self.num_greedy,
            "tensors": [_row_to_dict(row, self.dtype) for row in self.rows],
        }


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _row_to_dict(row: Row, dtype: str) -> dict[str, Any]:
    def error(error: Error) -> dict[str, Any]:
        return {
            "max": _finite(error.largest),
            "rms": _finite(error.rms),
            "rounding": [_finite(value) for value in error.rounding],
            "budget": _finite(error.budget),
            "share": _finite(error.share),
        }

    return {
        "kind": row.kind,
        "name": row.name,
        "case": row.case,
        "scale": _finite(row.error.scale),
        "ulps": _finite(row.error.ulps(dtype)),
        "within_budget": row.within,
        "dtypes": list(row.dtypes),
        **error(row.error),
        "wide": error(row.wide),
    }


def require_same_config(names: tuple[str, str], one: Config, other: Config) -> None:
    """Raises `MismatchError`, with both values of every field that differs, if any does."""
    problems = [f"{name}: {a} | {b}" for name, (a, b) in one.differences(other).items()]
    if problems:
        raise MismatchError(f"{names[0]} | {names[1]}: the configs differ", problems)


def compare(
    one: Callable[[], ComparedModel],
    other: Callable[[], ComparedModel],
    batch: ParityBatch,
    dtype: str,
    *,
    gradients: bool = False,
    num_greedy: int = 32,
    inside: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compares two models of one config; only one at a time is held in memory.

    Args:
      one: Makes the first model, in `dtype`; cast to float64, it is taken as true.
      other: Makes the second model.
      batch: The tokens to compare them on.
      dtype: "float64", "float32" or "bfloat16".
      gradients: Whether to compare every parameter's gradient.
      num_greedy: How many tokens to continue each row with.
      inside: Whether to compare the parts of blocks, too.
      progress: Called with a line about each step.
    """
    capacity = batch.tokens.shape[1] + num_greedy  # in every dtype, to compare states

    def readings(which: str, model: ComparedModel, dtypes: set[str]) -> dict[str, Reading]:
        names, found = activation_names(model.config, inside), {}
        for level in dtypes:
            progress(f"Reading with the {which} model in {level}")
            cast = model if level == dtype else model.cast(level)
            steps = num_greedy if level == dtype else 0
            found[level] = read(cast, batch, names, steps, gradients, capacity)
        return found

    progress("Loading the second model")
    model = other()
    wide, second_params = model.widest, model.parameters()
    second = readings("second", model, {dtype, wide})
    progress("Loading the first model")
    model = one()
    first_params, activations = (
        model.parameters(),
        {*activation_names(model.config, inside), "logits"},
    )
    first = readings("first", model, {dtype, wide, "float64"})
    del model

    def row(kind: str, name: str, case: str, tensor: Callable[[Reading], np.ndarray]) -> Row:
        a, b, true = tensor(first[dtype]), tensor(second[dtype]), tensor(first["float64"])
        error = compare_tensors(a, b, true, dtype)
        if wide != dtype:
            at_wide = compare_tensors(tensor(first[wide]), tensor(second[wide]), true, wide)
        else:
            at_wide = error
        # An implementation from outside may return other dtypes.
        dtypes = (a.dtype.name, b.dtype.name if wide == "float64" else a.dtype.name)
        return Row(kind, name, case, error, at_wide, dtypes)

    rows = [_parameter(name, value, second_params[name]) for name, value in first_params.items()]
    for case in CASES:
        for name in second[dtype].tensors[case]:
            kind = "activation" if name in activations else "state"
            rows.append(row(kind, name, case, lambda r, c=case, n=name: r.tensors[c][n]))
    for name in second[dtype].gradients:
        rows.append(row("gradient", name, "", lambda r, n=name: r.gradients[n]))
    logits = [
        np.concatenate([r[dtype].tensors[case]["logits"] for case in CASES]).astype(np.float64)
        for r in (first, second)
    ]
    same = first[dtype].greedy == second[dtype].greedy
    return Report(
        dtype,
        wide,
        tuple(rows),
        float(np.mean(logits[0].argmax(-1) == logits[1].argmax(-1))),
        _kl_divergence(*logits),
        tuple(int(n) for n in np.cumprod(same, 1).sum(1)),
        num_greedy,
    )


def _parameter(name: str, one: np.ndarray, other: np.ndarray) -> Row:
    """A parameter has no budget: every number must be the same."""
    one64, other64 = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.sqrt(np.mean(one64**2))) or 1.0
    apart = np.abs(one64 - other64) / scale
    same = np.array_equal(one64, other64)
    error = Error(
        scale,
        float(apart.max()),
        float(np.sqrt(np.mean(apart**2))),
        (0.0, 0.0),
        0.0,
        0.0 if same else math.inf,
    )
    return Row("parameter", name, "", error, error, (one.dtype.name, other.dtype.name))


def _kl_divergence(one: np.ndarray, other: np.ndarray) -> float:
    """The mean over places of sum p log(p / q), in nats; rounding below 0 is cut off."""
    log_p, log_q = (_log_softmax(logits) for logits in (one, other))
    return max(float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
