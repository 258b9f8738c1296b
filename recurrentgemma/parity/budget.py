"""How far apart two tensors are, and how far rounding may put them.

The network itself gives the budget of a tensor in a dtype: each model's error in that dtype is
measured against the first model in float64 on the same weights, and the smaller of the two errors
is taken as rounding. Neither error, nor the difference between the two models, may exceed `MARGIN`
times rounding in its root mean square, or twice that in its largest value, which depends more on
chance. So a model with larger errors cannot widen its own budget.

No wider dtype can measure float64. Its budget is 1e-10 of the largest value, which only the same
arithmetic keeps. Every pair is also compared in float64, where a wrong constant is far larger than
rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MARGIN = 4.0
FLOAT64_LIMIT = 1e-10
_ZERO = 1e-15  # for tensors that are exactly zero, such as the gradient of a softmax over one key
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}


class Error(NamedTuple):
    """The difference of two tensors, relative to the root mean square of the true one.

    Attributes:
      scale: The root mean square of the true tensor.
      largest: The largest difference.
      rms: The root mean square of the differences.
      rounding: The root mean square error of the first tensor, and of the second.
      budget: The limit of `rms` and of both values of `rounding`.
      share: The largest part of its budget that any error takes; above 1 it is beyond it.
    """

    scale: float
    largest: float
    rms: float
    rounding: tuple[float, float]
    budget: float
    share: float

    def ulps(self, dtype: str) -> float:
        """The largest difference, in units of the last place at the tensor's scale."""
        return self.largest / EPS[dtype]


def compare_tensors(one: np.ndarray, other: np.ndarray, true: np.ndarray, dtype: str) -> Error:
    """The difference of two tensors that were computed in a dtype, measured by the true one."""
    one, other, true = (np.asarray(z, np.float64).ravel() for z in (one, other, true))
    scale = _rms(true) or 1.0
    apart = np.abs(one - other)
    largest, rms = float(apart.max(initial=0.0)) / scale, _rms(apart) / scale
    if dtype == "float64":
        budget = (FLOAT64_LIMIT * float(np.abs(true).max(initial=0.0)) + _ZERO) / scale
        return Error(scale, largest, rms, (0.0, 0.0), budget, _share(largest, budget))
    errors = np.abs(one - true), np.abs(other - true)
    first, second = (_rms(error) / scale for error in errors)
    budget = MARGIN * max(min(first, second), EPS[dtype] / 2)
    peaks = [float(error.max(initial=0.0)) / scale for error in errors]
    peak_budget = 2 * MARGIN * max(min(peaks), EPS[dtype] / 2)
    shares = [_share(error, budget) for error in (rms, first, second)]
    shares += [_share(error, peak_budget) for error in (largest, *peaks)]
    share = max(shares)
    if largest == 0 and share < np.inf:  # equal tensors have equal errors
        share = 0.0
    return Error(scale, largest, rms, (first, second), budget, share)


def _rms(z: np.ndarray) -> float:
    return float(np.sqrt(np.mean(z**2))) if z.size else 0.0


def _share(error: float, budget: float) -> float:
    """The part of the budget; infinite if there is a NaN, which no comparison finds."""
    return float(error / budget) if np.isfinite(error) and np.isfinite(budget) else np.inf
