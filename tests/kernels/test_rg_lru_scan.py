"""The fused RG-LRU recurrence: one suite that every implementation of both twins inherits."""

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
from cases import bfloat16
from scans import (
    INTERPRETED_SHAPES,
    SHAPES,
    Implementation,
    each,
    implementations,
    make_rg_lru,
    rg_lru_scan_grads,
)
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.model import reference
from tolerances import assert_close, assert_close_where_finite

NAMES = ("x", "input_gate", "a_gate", "a_param", "h0")
STARTS = list(itertools.product([1, 7, "several"], [np.inf, np.nan]))
FEW_STARTS = [(1, np.inf), (7, np.nan), ("several", np.inf)]


@pytest.fixture(scope="module", params=implementations())
def scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


def check(scan: Implementation, case, dtype: str) -> None:
    """States, the last of them, and the gradients of every input."""
    states, gradients = scan.rg_lru_scan_vjp(
        *case.inputs, dy=case.dy, dlast=case.dlast, dtype=dtype
    )
    for got, want in zip(states, reference.rg_lru_scan(*case.inputs), strict=True):
        assert_close(got, want, "state", dtype)
    for name, got, want in zip(NAMES, gradients, rg_lru_scan_grads(case), strict=True):
        assert_close(got, want, "gradient", dtype, name=name)


class TestRGLRUScan:
    @each("shape", SHAPES, INTERPRETED_SHAPES)
    def test_states_and_gradients(self, scan: Implementation, shape) -> None:
        check(scan, make_rg_lru(*shape), scan.dtype)

    def test_float32(self, scan: Implementation) -> None:
        check(scan, make_rg_lru(3, scan.steps("several"), 96), "float32")

    @each("dtype", ["float32", "widest"], sweep(["widest"], ["float32", "widest"]))
    def test_decays_at_the_ends(self, scan: Implementation, dtype: str) -> None:
        """Gates for which a is 0, 1 - 1e-7 and 1; the square root's gradient is clipped there."""
        case = make_rg_lru(3, scan.steps("several"), 96, a_gates=(400.0, 10.0, -18.0, -200.0))
        case.a_param[::2] = 30.0
        check(scan, case, dtype.replace("widest", scan.dtype))

    def test_no_initial_state(self, scan: Implementation) -> None:
        inputs = make_rg_lru(3, 17, 96).inputs[:-1]
        actual = scan.rg_lru_scan(*inputs, dtype=scan.dtype)
        for got, want in zip(actual, reference.rg_lru_scan(*inputs), strict=True):
            assert_close(got, want, "state", scan.dtype)

    @each("length", [7, "several"], sweep(["several"], [7, "several"]))
    def test_bfloat16_keeps_a_float32_state(self, scan: Implementation, length) -> None:
        if scan.name == "triton":
            pytest.skip("interpreted, Triton truncates to bfloat16; see tests/torch/test_triton.py")
        case = make_rg_lru(3, scan.steps(length), 96)
        rounded = {name: bfloat16(getattr(case, name)) for name in (*NAMES[:-1], "dy")}
        case = case._replace(**rounded)
        (y, last), gradients = scan.rg_lru_scan_vjp(
            *case.inputs, dy=case.dy, dlast=case.dlast, dtype="bfloat16"
        )
        expected, expected_last = reference.rg_lru_scan(*case.inputs)
        assert_close(last, expected_last, "state", "float32")
        assert_close(y, expected, "scan", "bfloat16")
        np.testing.assert_array_equal(y, bfloat16(y))
        assert (last != bfloat16(last)).any()
        for name, got, want in zip(NAMES, gradients, rg_lru_scan_grads(case), strict=True):
            assert_close(got, want, "output", "bfloat16", name=name)

    @pytest.mark.parametrize("length", [1, 17])
    def test_second_derivatives(self, scan: Implementation, length: int) -> None:
        """Slopes of the gradients, also where a is 1 and the square root's gradient clipped."""
        if scan.dtype != "float64" or scan.name == "triton":
            pytest.skip("a kernel's backward pass is not differentiated")
        case = make_rg_lru(2, length, 3, a_gates=(-1000.0,))
        rng = np.random.default_rng(1)
        inputs = [getattr(case, name) for name in NAMES]
        directions, along = (tuple(rng.standard_normal(z.shape) for z in inputs) for _ in range(2))

        def projected(step: float) -> float:
            moved = {
                name: value + step * d for name, value, d in zip(NAMES, inputs, along, strict=True)
            }
            gradients = rg_lru_scan_grads(case._replace(**moved))
            return sum((d * g).sum() for d, g in zip(directions, gradients, strict=True))

        seconds = scan.rg_lru_scan_second_vjp(
            *case.inputs, dy=case.dy, dlast=case.dlast, directions=directions
        )
        slope = (projected(1e-5) - projected(-1e-5)) / 2e-5
        expected = sum((d * g).sum() for d, g in zip(along, seconds, strict=True))
        assert_close(slope, expected, "slope", "float64")

    @each("length,value", STARTS, sweep(FEW_STARTS, STARTS))
    def test_nothing_crosses_a_start(self, scan: Implementation, length, value: float) -> None:
        """Neither an initial state nor a step's that is not finite."""
        case = make_rg_lru(3, scan.steps(length), 96)
        case.segment_pos[1:] += 1  # no padding, and no start in the last row
        case.segment_pos[:2, 0] = 0
        case.h0[:2, ::2] = value
        if length != 1:
            case.x[0, 1, ::3] = value
        actual = scan.rg_lru_scan(*case.inputs, dtype=scan.dtype)
        for got, want in zip(actual, reference.rg_lru_scan(*case.inputs), strict=True):
            assert_close_where_finite(got, want, "state", scan.dtype)

    def test_no_gradient_crosses_a_start(self, scan: Implementation) -> None:
        """From an initial state that is not finite."""
        case = make_rg_lru(3, 7, 96)
        case.segment_pos[:, 0] = 0
        expected = rg_lru_scan_grads(case)
        case.h0[:] = np.nan
        _, gradients = scan.rg_lru_scan_vjp(
            *case.inputs, dy=case.dy, dlast=case.dlast, dtype=scan.dtype
        )
        for name, got, want in zip(NAMES, gradients, expected, strict=True):
            assert_close(got, want, "gradient", scan.dtype, name=name)

    @pytest.mark.parametrize("shape", [(3, 0, 5), (0, 7, 5), (0, 0, 5)], ids=str)
    def test_nothing_to_do(self, scan: Implementation, shape) -> None:
        batch, length, _ = shape
        case = make_rg_lru(3, 7, 5)
        *sequences, a_param, segment_pos, h0 = case.inputs
        sequences = [value[:batch, :length] for value in sequences]
        inputs = (*sequences, a_param, segment_pos[:batch, :length], h0[:batch])
        y, last = scan.rg_lru_scan(*inputs, dtype=scan.dtype)
        assert y.shape == shape
        np.testing.assert_array_equal(last, h0[:batch])
        dlast = case.dlast[:batch]
        _, gradients = scan.rg_lru_scan_vjp(*inputs, dy=y, dlast=dlast, dtype=scan.dtype)
        assert [gradient.shape for gradient in gradients[:3]] == [shape] * 3
        np.testing.assert_array_equal(gradients[3], np.zeros(5))
        np.testing.assert_array_equal(gradients[4], dlast)

    def test_padding_alone(self, scan: Implementation) -> None:
        case = make_rg_lru(3, 7, 96)
        case.segment_pos[:] = -1
        y, last = scan.rg_lru_scan(*case.inputs, dtype=scan.dtype)
        np.testing.assert_array_equal(last, case.h0)
        np.testing.assert_array_equal(y, np.broadcast_to(case.h0[:, None], y.shape))


@pytest.mark.parametrize("length", [1, 17])
def test_auto_is_the_one_that_is_chosen(backend: Backend, length: int) -> None:
    """To the last bit, so that no test need be run on both."""
    case = make_rg_lru(3, length, 96)
    module = importlib.import_module(f"recurrentgemma.{backend.name}")
    x = backend.array(case.x, "float32")
    chosen = module.choose_implementation(case.x.shape, x.dtype, "cpu").name
    results = [
        Implementation(backend, name).rg_lru_scan_vjp(
            *case.inputs, dy=case.dy, dlast=case.dlast, dtype="float32"
        )
        for name in ("auto", chosen)
    ]
    for parts in zip(*results, strict=True):
        for got, want in zip(*parts, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("unchecked_types")
class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": (7, 4)}, r"x must have shape \[B, T, D\], got \(7, 4\)"),
            ({"input_gate": (3, 7, 5)}, r"input_gate must have shape \(3, 7, 4\), got \(3, 7, 5\)"),
            ({"a_gate": (3, 6, 4)}, r"a_gate must have shape \(3, 7, 4\), got \(3, 6, 4\)"),
            ({"a_param": (5,)}, r"a_param must have shape \(4,\), got \(5,\)"),
            ({"segment_pos": (3, 1)}, r"segment_pos must have shape \(3, 7\), got \(3, 1\)"),
            ({"h0": (1, 4)}, r"h0 must have shape \(3, 4\), got \(1, 4\)"),
        ],
        ids=["x", "input_gate", "a_gate", "a_param", "segment_pos", "h0"],
    )
    def test_shapes(self, backend: Backend, changes, message: str) -> None:
        shapes = {
            "x": (3, 7, 4),
            "input_gate": (3, 7, 4),
            "a_gate": (3, 7, 4),
            "a_param": (4,),
            "segment_pos": (3, 7),
            "h0": (3, 4),
        }
        inputs: dict[str, Any] = {
            name: np.zeros(shape) for name, shape in (shapes | changes).items()
        }
        with pytest.raises(ValueError, match=message):
            backend.rg_lru_scan(**inputs)

    @pytest.mark.parametrize("dtype", ["bool", "float32", "complex64"])
    def test_positions_are_integers(self, backend: Backend, dtype: str) -> None:
        rg_lru_scan = importlib.import_module(f"recurrentgemma.{backend.name}").rg_lru_scan
        x, a_param = (backend.array(np.zeros(shape), "float32") for shape in ((1, 2, 3), (3,)))
        position = backend.array(np.zeros((1, 2)), dtype)
        with pytest.raises(ValueError, match="segment_pos must be of an integer dtype, got "):
            rg_lru_scan(x, x, x, a_param, position)

    def test_names(self, backend: Backend) -> None:
        with pytest.raises(
            ValueError, match=r"implementation must be one of .*reference.*, got 'quick'"
        ):
            backend.rg_lru_scan(*make_rg_lru(1, 2, 1).inputs, implementation="quick")
