"""The linear recurrence: one suite that every implementation of both twins inherits."""

import importlib
import itertools

import numpy as np
import pytest
from cases import bfloat16
from scans import (
    INTERPRETED_SHAPES,
    SHAPES,
    Implementation,
    both_ways,
    each,
    implementations,
    in_turn,
    linear_scan_grads,
    make_scan,
)
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.model import reference
from tolerances import assert_close, assert_close_where_finite


@pytest.fixture(scope="module", params=implementations())
def scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


def check(scan: Implementation, case, dtype: str, reverse: bool) -> None:
    """States, the last of them, and the gradients of every input."""
    states, gradients = scan.linear_scan_vjp(
        *case.inputs, dy=case.dy, dlast=case.dlast, dtype=dtype, reverse=reverse
    )
    for got, want in zip(states, reference.linear_scan(*case.inputs, reverse=reverse), strict=True):
        assert_close(got, want, "state", dtype)
    expected = linear_scan_grads(case, reverse)
    for name, got, want in zip(("x", "a", "h0"), gradients, expected, strict=True):
        assert_close(got, want, "gradient", dtype, name=name)


both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
GIVEN = [("nothing",), ("h0",), ("reset",)]
DTYPES = [("float32",), ("widest",)]
LENGTHS = [(7,), ("several",)]
RESETS = both_ways(itertools.product([1, 7, "several"], [np.inf, np.nan]))
# Each direction of several tiles, one of fewer: in programs of `test_states_and_gradients`.
FEW_RESETS = in_turn([(1, np.inf), (7, np.nan), ("several", np.inf), ("several", np.nan)])


class TestScan:
    @each("shape,reverse", in_turn((s,) for s in SHAPES), in_turn((s,) for s in INTERPRETED_SHAPES))
    def test_states_and_gradients(self, scan: Implementation, shape, reverse: bool) -> None:
        check(scan, make_scan(*shape), scan.dtype, reverse)

    @each("given,reverse", both_ways(GIVEN), in_turn(GIVEN))
    def test_what_is_left_out(self, scan: Implementation, given: str, reverse: bool) -> None:
        case = make_scan(3, 17, 96)
        h0 = case.h0 if given == "h0" else None
        reset = case.reset if given == "reset" else None
        actual = scan.linear_scan(case.x, case.a, h0, reset, dtype=scan.dtype, reverse=reverse)
        expected = reference.linear_scan(case.x, case.a, h0, reset, reverse)
        for got, want in zip(actual, expected, strict=True):
            assert_close(got, want, "state", scan.dtype)

    @each("reverse", [False, True], sweep([False], [False, True]))
    def test_float32(self, scan: Implementation, reverse: bool) -> None:
        check(scan, make_scan(3, scan.steps("several"), 96), "float32", reverse)

    @each("dtype,reverse", both_ways(DTYPES), in_turn(DTYPES))
    def test_decays_at_the_ends(self, scan: Implementation, dtype: str, reverse: bool) -> None:
        """Nothing kept, almost everything, everything."""
        case = make_scan(3, scan.steps("several"), 96, decays=(0.0, 1 - 1e-7, 1.0))
        check(scan, case, dtype.replace("widest", scan.dtype), reverse)

    @both_directions
    def test_long_products_underflow_quietly(self, scan: Implementation, reverse: bool) -> None:
        """Decays of many steps vanish in float32; the states do not."""
        case = make_scan(3, scan.steps("several"), 96)
        case = case._replace(a=case.a * 1e-6, reset=np.zeros_like(case.reset))
        check(scan, case, "float32", reverse)

    @each("length,reverse", both_ways(LENGTHS), in_turn(LENGTHS))
    def test_bfloat16_keeps_a_float32_state(
        self, scan: Implementation, length, reverse: bool
    ) -> None:
        if scan.name == "triton":
            pytest.skip("interpreted, Triton truncates to bfloat16; see tests/torch/test_triton.py")
        case = make_scan(3, scan.steps(length), 96)
        case = case._replace(x=bfloat16(case.x), a=bfloat16(case.a), dy=bfloat16(case.dy))
        (y, last), gradients = scan.linear_scan_vjp(
            *case.inputs, dy=case.dy, dlast=case.dlast, dtype="bfloat16", reverse=reverse
        )
        expected, expected_last = reference.linear_scan(*case.inputs, reverse=reverse)
        assert_close(last, expected_last, "state", "float32")
        assert_close(y, expected, "scan", "bfloat16")
        np.testing.assert_array_equal(y, bfloat16(y))
        assert (last != bfloat16(last)).any()
        dx, da, dh0 = linear_scan_grads(case, reverse)
        assert_close(gradients[0], dx, "scan", "bfloat16")
        assert_close(gradients[1], da, "output", "bfloat16")  # from states rounded to bfloat16
        assert_close(gradients[2], dh0, "gradient", "float32")

    @each("length,value,reverse", RESETS, sweep(FEW_RESETS, RESETS))
    def test_nothing_crosses_a_reset(
        self, scan: Implementation, length, value: float, reverse: bool
    ) -> None:
        """Neither an initial state nor a step's that is not finite; nor do their gradients."""
        case = make_scan(3, scan.steps(length), 96)
        first, second = (-1, -2) if reverse else (0, 1)
        case.h0[:, ::2] = value
        if length != 1:
            case.x[0, second, ::3] = value
            case.reset[:, first] = [True, True, False]
        states, (dx, _, dh0) = scan.linear_scan_vjp(
            *case.inputs, dy=case.dy, dlast=case.dlast, dtype=scan.dtype, reverse=reverse
        )
        expected = reference.linear_scan(*case.inputs, reverse=reverse)
        for got, want in zip(states, expected, strict=True):
            assert_close_where_finite(got, want, "state", scan.dtype)
        expected_dx, _, expected_dh0 = linear_scan_grads(case, reverse)
        assert_close(dx, expected_dx, "gradient", scan.dtype, name="x")
        assert_close(dh0, expected_dh0, "gradient", scan.dtype, name="h0")

    @both_directions
    @pytest.mark.parametrize("shape", [(3, 0, 5), (0, 7, 5), (0, 0, 5)], ids=str)
    def test_nothing_to_do(self, scan: Implementation, shape, reverse: bool) -> None:
        batch, length, _ = shape
        case = make_scan(3, 7, 5)
        x, a, reset = (value[:batch, :length] for value in (case.x, case.a, case.reset))
        h0, dlast, dtype = case.h0[:batch], case.dlast[:batch], scan.dtype
        y, last = scan.linear_scan(x, a, h0, reset, dtype=dtype, reverse=reverse)
        assert y.shape == shape
        np.testing.assert_array_equal(last, h0)
        _, zeros = scan.linear_scan(x, a, dtype=dtype, reverse=reverse)
        np.testing.assert_array_equal(zeros, np.zeros_like(h0))
        _, (dx, da, dh0) = scan.linear_scan_vjp(
            x, a, h0, reset, dy=x, dlast=dlast, dtype=dtype, reverse=reverse
        )
        assert dx.shape == da.shape == shape
        np.testing.assert_array_equal(dh0, dlast)


@pytest.mark.parametrize("length", [1, 17])
def test_auto_is_the_one_that_is_chosen(backend: Backend, length: int) -> None:
    """To the last bit, so that no test need be run on both."""
    case = make_scan(3, length, 96)
    module = importlib.import_module(f"recurrentgemma.{backend.name}")
    x = backend.array(case.x, "float32")
    chosen = module.choose_implementation(case.x.shape, x.dtype, "cpu").name
    assert chosen != "auto"
    results = [
        Implementation(backend, name).linear_scan_vjp(
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
            ({"a": (3, 7, 5)}, r"x and a must have one shape \[B, T, D\], got \(3, 7, 4\) and"),
            ({"x": (7, 4), "a": (7, 4)}, r"one shape \[B, T, D\], got \(7, 4\) and \(7, 4\)"),
            ({"h0": (1, 4)}, r"h0 must have shape \(3, 4\), got \(1, 4\)"),
            ({"h0": (3, 1, 4)}, r"h0 must have shape \(3, 4\), got \(3, 1, 4\)"),
            ({"reset": (3, 1)}, r"reset must have shape \(3, 7\), got \(3, 1\)"),
            ({"reset": (3, 7, 1)}, r"reset must have shape \(3, 7\), got \(3, 7, 1\)"),
        ],
        ids=["a", "x and a", "h0", "h0 of a step", "reset of a row", "reset of a channel"],
    )
    def test_shapes(self, backend: Backend, changes, message: str) -> None:
        shapes = {"x": (3, 7, 4), "a": (3, 7, 4), "h0": (3, 4), "reset": (3, 7)} | changes
        x, a, h0, reset = (np.zeros(shapes[name]) for name in ("x", "a", "h0", "reset"))
        with pytest.raises(ValueError, match=message):
            backend.linear_scan(x, a, h0, reset.astype(bool))

    @pytest.mark.parametrize("name", ["x", "a", "h0", "reset"])
    def test_dtypes(self, backend: Backend, name: str) -> None:
        linear_scan = importlib.import_module(f"recurrentgemma.{backend.name}").linear_scan
        shapes = {"x": (1, 2, 3), "a": (1, 2, 3), "h0": (1, 3), "reset": (1, 2)}
        dtypes = {"x": "float32", "a": "float32", "h0": "float32", "reset": "bool", name: "int32"}
        values = [backend.array(np.zeros(shapes[key]), dtypes[key]) for key in shapes]
        kind = "a bool" if name == "reset" else "a floating"
        with pytest.raises(ValueError, match=rf"{name} must be of {kind} dtype, got .*int32"):
            linear_scan(*values)

    def test_names(self, backend: Backend) -> None:
        case = make_scan(1, 2, 1)
        with pytest.raises(
            ValueError, match=r"implementation must be one of .*reference.*, got 'quick'"
        ):
            backend.linear_scan(case.x, case.a, implementation="quick")
