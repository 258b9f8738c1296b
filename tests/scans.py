"""What the tests of the recurrences run: implementations, cases, and the gradients to expect."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
from sweeps import sweep

from backends import BACKENDS, TWINS, Backend
from recurrentgemma.common.model import reference

MAX_SQRT_GRADIENT = 1000.0
# Each T of 1, 2, 7, 63, 64, 65, 1000, each D of 1, 96, 128, 500, 2560; one row and three. 16 and
# 17: where implementations change from one form to another.
SHAPES = [
    (3, 1, 1),
    (1, 1, 2560),
    (3, 2, 96),
    (1, 7, 500),
    (3, 16, 1),
    (1, 17, 96),
    (3, 63, 128),
    (1, 64, 96),
    (3, 65, 96),
    (1, 65, 2560),
    (3, 1000, 96),
]
# The same for what is interpreted, which is slow: a program for each shape is built anew in every
# process, so that the tests share these. Less than a tile of steps and several, whole and cut off;
# several blocks of channels, and of time (see `small_tiles`).
INTERPRETED_SHAPES = sweep(
    [(3, 1, 96), (3, 7, 96), (1, 16, 640), (3, 19, 96)],
    [(3, 1, 1), (1, 2, 96), (1, 7, 2560), (3, 63, 128), (1, 64, 500), (3, 65, 96), (1, 1000, 1)],
)


class Implementation(NamedTuple):
    """One implementation of one twin."""

    backend: Backend
    name: str

    @property
    def dtype(self) -> str:
        """The widest that it computes in."""
        return self.backend.widest(self.name)

    def steps(self, length: int | str) -> int:
        """A length; "several" is several tiles, the last one cut off."""
        if isinstance(length, int):
            return length
        return sweep(19, 65) if self.is_interpreted else 65

    @property
    def is_interpreted(self) -> bool:
        return self.name.startswith(("pallas", "triton"))

    def linear_scan(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        return self.backend.linear_scan(*args, implementation=self.name, **kwargs)

    def linear_scan_vjp(self, *args: Any, **kwargs: Any) -> tuple[tuple[np.ndarray, ...], ...]:
        return self.backend.linear_scan_vjp(*args, implementation=self.name, **kwargs)

    def rg_lru_scan(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        return self.backend.rg_lru_scan(*args, implementation=self.name, **kwargs)

    def rg_lru_scan_vjp(self, *args: Any, **kwargs: Any) -> tuple[tuple[np.ndarray, ...], ...]:
        return self.backend.rg_lru_scan_vjp(*args, implementation=self.name, **kwargs)

    def rg_lru_scan_second_vjp(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        return self.backend.rg_lru_scan_second_vjp(*args, implementation=self.name, **kwargs)


def each(
    names: str, every: Iterable[Any], interpreted: Iterable[Any], *twins: str, scan: str = "scan"
) -> pytest.MarkDecorator:
    """Parametrises `scan` and these names: every implementation of the twins on each of its cases.

    Those that are interpreted have cases of their own.
    """
    every, interpreted = list(every), list(interpreted)
    params = [
        pytest.param(
            *param.values,
            *(case if "," in names else (case,)),
            id=f"{param.id}-{case}",
            marks=param.marks,
        )
        for param in implementations(*twins)
        for case in (interpreted if _is_interpreted(*param.values) else every)
    ]
    return pytest.mark.parametrize(f"{scan},{names}", params)


def both_ways(cases: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Each case forward and in reverse."""
    return [(*case, reverse) for case in cases for reverse in (False, True)]


def in_turn(cases: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """One case forward, the next in reverse; in the long profile each both ways."""
    cases = list(cases)
    turns = [(*case, bool(i % 2)) for i, case in enumerate(cases)]
    return sweep(turns, both_ways(cases))


def _is_interpreted(implementation: Implementation | None) -> bool:
    return implementation is not None and implementation.is_interpreted


def implementations(*twins: str, auto: bool = False) -> list[Any]:
    """Test parameters: every implementation that this machine can run, interpreted or not.

    With `auto` also the name that stands for one of the others.
    """
    params = []
    for twin in twins or TWINS:
        if twin not in BACKENDS:
            reason = pytest.mark.skip(reason=f"{twin} is not installed")
            params.append(pytest.param(None, id=twin, marks=reason))
            continue
        for name in BACKENDS[twin].implementations()[not auto :]:
            absent = name == "triton" and importlib.util.find_spec("triton") is None
            marks = [pytest.mark.skip(reason="triton is not installed")] if absent else []
            implementation = Implementation(BACKENDS[twin], name)
            params.append(pytest.param(implementation, id=f"{twin}-{name}", marks=marks))
    return params


def float32(value: np.ndarray) -> np.ndarray:
    """Rounded to float32, so that no implementation rounds its inputs."""
    return value.astype(np.float32).astype(np.float64)


# -------------------------------------------------------------------------------------- linear scan


class ScanCase(NamedTuple):
    """Arguments of `linear_scan`, and the cotangents of its outputs."""

    x: np.ndarray
    a: np.ndarray
    h0: np.ndarray
    reset: np.ndarray
    dy: np.ndarray
    dlast: np.ndarray

    @property
    def inputs(self) -> Any:
        return self[:4]


def make_scan(batch: int, length: int, width: int, decays: tuple[float, ...] = ()) -> ScanCase:
    """Resets at the first and the last step, and at two adjacent ones between, by row.

    Half of the decays are among `decays`, where there are any.
    """
    rng = np.random.default_rng(length)
    x, dy = float32(rng.standard_normal((2, batch, length, width)))
    h0, dlast = float32(rng.standard_normal((2, batch, width)))
    a = rng.uniform(0.2, 1, x.shape)
    if decays:
        a = np.where(rng.random(a.shape) < 0.5, a, rng.choice(decays, a.shape))
    return ScanCase(x, float32(a), h0, _events(batch, length), dy, dlast)


def _events(batch: int, length: int) -> np.ndarray:
    events = np.zeros((batch, length), bool)
    middle = length // 2
    for row, steps in enumerate([[middle, min(middle + 1, length - 1)], [0], [length - 1]]):
        if row < batch:
            events[row, steps] = True
    return events


def linear_scan_grads(
    case: ScanCase, reverse: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients for x, a and h0 of sum(dy * y) + sum(dlast * last): the adjoint recurrence."""
    order = range(case.x.shape[1])
    order = list(reversed(order) if reverse else order)
    y, _ = reference.linear_scan(*case.inputs, reverse=reverse)
    dx, da = np.zeros_like(case.x), np.zeros_like(case.a)
    dh = case.dlast.copy()
    for i in reversed(range(len(order))):
        t = order[i]
        before = y[:, order[i - 1]] if i else case.h0
        kept = ~case.reset[:, t, None]
        dh = dh + case.dy[:, t]
        dx[:, t], da[:, t] = dh, np.where(kept, dh * before, 0)
        dh = np.where(kept, case.a[:, t] * dh, 0)
    return dx, da, dh


# -------------------------------------------------------------------------------------- RG-LRU scan


class RGLRUCase(NamedTuple):
    """Arguments of `rg_lru_scan`, and the cotangents of its outputs."""

    x: np.ndarray
    input_gate: np.ndarray
    a_gate: np.ndarray
    a_param: np.ndarray
    segment_pos: np.ndarray
    h0: np.ndarray
    dy: np.ndarray
    dlast: np.ndarray

    @property
    def inputs(self) -> Any:
        return self[:6]


def make_rg_lru(batch: int, length: int, width: int, a_gates: tuple[float, ...] = ()) -> RGLRUCase:
    """Documents that start at a row's first and last step and at adjacent ones; a padded row.

    Half of the gates before the sigmoid are among `a_gates`, where there are any.
    """
    rng = np.random.default_rng(length)
    x, input_gate, dy = float32(rng.standard_normal((3, batch, length, width)))
    h0, dlast = float32(rng.standard_normal((2, batch, width)))
    a_gate = 2 * rng.standard_normal(x.shape)
    if a_gates:
        a_gate = np.where(rng.random(x.shape) < 0.5, a_gate, rng.choice(a_gates, x.shape))
    starts = _events(batch, length)
    segment_pos = np.zeros((batch, length), np.int32)
    position = np.full(batch, 3)
    for t in range(length):
        position = np.where(starts[:, t], 0, position + 1)
        segment_pos[:, t] = position
    segment_pos[-1, : length // 3] = -1  # some decoding: the state passes through
    a_param = float32(rng.standard_normal(width))
    return RGLRUCase(x, input_gate, float32(a_gate), a_param, segment_pos, h0, dy, dlast)


def rg_lru_scan_grads(case: RGLRUCase) -> tuple[np.ndarray, ...]:
    """Gradients for x, input_gate, a_gate, a_param and h0, the square root's clipped at 1000."""
    start, padding = ((case.segment_pos == 0)[..., None], (case.segment_pos < 0)[..., None])
    i, r = reference.sigmoid(case.input_gate), reference.sigmoid(case.a_gate)
    rate = -reference.RG_LRU_C * reference.softplus(case.a_param)
    square = -np.expm1(2 * rate * r)
    root = np.sqrt(square)
    multiplier = np.where(padding, 0, np.where(start, 1, root))
    decay = np.where(padding, 1, np.exp(rate * r))
    scan = ScanCase(
        multiplier * i * case.x, decay, case.h0, case.segment_pos == 0, case.dy, case.dlast
    )
    dgated, ddecay, dh0 = linear_scan_grads(scan)
    with np.errstate(divide="ignore"):
        slope = np.minimum(0.5 / root, MAX_SQRT_GRADIENT)
    dsquare = np.where(start | padding, 0, dgated * i * case.x * slope)
    dlog_a = np.where(padding, 0, ddecay * decay) - dsquare * 2 * (1 - square)
    return (
        dgated * multiplier * i,
        dgated * multiplier * case.x * i * (1 - i),
        dlog_a * rate * r * (1 - r),
        (dlog_a * -reference.RG_LRU_C * r).sum((0, 1)) * reference.sigmoid(case.a_param),
        dh0,
    )
