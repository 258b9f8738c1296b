"""How parameters are optimised: the options, and the learning rate of each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.scalars import make_plain

if TYPE_CHECKING:  # NumPy is slow to import
    import numpy as np

    from recurrentgemma.common.model.layer_spec import ParamSpec

OPTIMIZERS = ("adamw", "sgd", "adafactor")
# Adafactor: at step n its averages move by n^-DECAY. EPS and MIN_SCALE are the least values of its
# roots and scales, CLIP is the largest root mean square of an update.
ADAFACTOR_DECAY = 0.8
ADAFACTOR_EPS = 1e-15
ADAFACTOR_MIN_SCALE = 1e-3
ADAFACTOR_CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """An optimiser and its schedule.

    With learning rate r, weight decay w (0 where the layer spec says no decay) and gradient g:

    - "adamw": p <- (1 - r w) p - r m / (sqrt(v) + eps); m and v are the bias-corrected averages of
      g and g^2.
    - "sgd": p <- p - r m, m <- momentum m + g + w p.
    - "adafactor": p <- (1 - r w) p - min(r, 1 / sqrt(n)) max(rms(p), 1e-3) u / max(1, rms(u)) at
      step n, with u = g / sqrt(v). v is an average of g^2; for a matrix it is kept as one number a
      row and one a column (arXiv 1804.04235, without momentum).

    Attributes:
      name: The optimiser.
      learning_rate: The highest learning rate.
      weight_decay: w above.
      b1: Decay of AdamW's average of gradients.
      b2: Decay of AdamW's average of squared gradients.
      eps: Added to the root by AdamW.
      momentum: Momentum of SGD.
      clip_norm: The largest norm of the gradients over all parameters: larger ones are scaled to
        it. None turns this off.
      warmup_steps: Number of steps over which the learning rate grows linearly.
      total_steps: The step at which the learning rate, after half a cosine, reaches its floor. None
        keeps it constant after the warm-up.
      final_fraction: The floor, as a share of `learning_rate`.
      skip_nonfinite: Whether a step whose loss or gradient is NaN or infinite changes nothing but
        the number of steps.

    Raises:
      ValueError: An option is out of range; the message names it.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    clip_norm: float | None = 1.0
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.1
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        if self.name not in OPTIMIZERS:
            raise UserError(f"name must be one of {', '.join(OPTIMIZERS)}, got {self.name!r}")
        for field in ("learning_rate", "eps", "clip_norm", "total_steps"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{field} must be positive, got {value}")
        for field in ("weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UserError(f"{field} must be at least 0, got {getattr(self, field)}")
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise UserError(
                "total_steps must be more than warmup_steps, "
                f"got total_steps={self.total_steps} warmup_steps={self.warmup_steps}"
            )


_BESIDE_OWN = OptimizerOptions(clip_norm=None)
OWN = "optimizer"  # the group of the arrays of a user's own optimiser


def step_settings(optimizer: Any) -> OptimizerOptions:
    """The settings of a step; beside a user's own optimiser it neither clips nor skips."""
    return optimizer if isinstance(optimizer, OptimizerOptions) else _BESIDE_OWN


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """The learning rate of a step; the first step is 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.total_steps is None:
        return options.learning_rate
    done = (step - options.warmup_steps) / (options.total_steps - options.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return options.learning_rate * (options.final_fraction + (1 - options.final_fraction) * cosine)


def decay_mask(specs: Iterable[ParamSpec]) -> dict[str, bool]:
    """Whether weight decay applies, by path."""
    return {spec.path: spec.decay for spec in specs}


def moment_shapes(
    options: OptimizerOptions, specs: Sequence[ParamSpec]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of an optimiser's state in the Flax layout, by name and path.

    AdamW has "mu" and "nu", SGD with momentum has "momentum". Adafactor has "rows" [..., I, 1] and
    "columns" [..., 1, J] for matrices and "nu" for vectors.
    """
    if options.name == "adafactor":
        matrices = [spec for spec in specs if len(spec.shape) > 1]
        return {
            "rows": {spec.path: (*spec.shape[:-1], 1) for spec in matrices},
            "columns": {spec.path: (*spec.shape[:-2], 1, spec.shape[-1]) for spec in matrices},
            "nu": {spec.path: spec.shape for spec in specs if len(spec.shape) == 1},
        }
    names = {"adamw": ("mu", "nu"), "sgd": ("momentum",) if options.momentum else ()}[options.name]
    return {name: {spec.path: spec.shape for spec in specs} for name in names}


def state_shapes(optimizer: Any, specs: Sequence[ParamSpec]) -> dict[str, tuple[int, ...]]:
    """The shapes of a training state's arrays in the Flax layout, by name.

    The arrays of a user's own optimiser are not among them.
    """
    groups = {"parameters": {spec.path: spec.shape for spec in specs}}
    if isinstance(optimizer, OptimizerOptions):
        groups |= moment_shapes(optimizer, specs)
    return {"step": ()} | {
        f"{group}.{path}": shape
        for group, shapes in groups.items()
        for path, shape in shapes.items()
    }


def given_shapes(optimizer: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays, to be compared with `state_shapes`."""
    own = not isinstance(optimizer, OptimizerOptions)
    return {
        name: tuple(array.shape)
        for name, array in arrays.items()
        if not (own and name.startswith(f"{OWN}."))
    }


def grouped(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """A training state's arrays, except for its step, by group and path."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        group, _, path = name.partition(".")
        groups.setdefault(group, {})[path] = array
    groups.pop("step", None)
    return groups
