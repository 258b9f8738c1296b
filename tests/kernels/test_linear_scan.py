"""The linear recurrence: one suite that every implementation of both twins inherits."""

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import bfloat16

from backends import BACKENDS, TWINS, Backend
from recurrentgemma.common import reference
from tolerances import assert_close

# Each T of 1, 2, 7, 16, 17, 63, 64, 65, 200; one row and three; one channel and many.
SHAPES = [
    (1, 1, 1),
    (3, 2, 96),
    (1, 7, 96),
    (3, 16, 1),
    (1, 17, 96),
    (3, 63, 1),
    (1, 64, 96),
    (3, 65, 96),
    (1, 200, 96),
]


class Implementation(NamedTuple):
    backend: Backend
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.backend.linear_scan(*args, implementation=self.name, **kwargs)

    def vjp(self, *args: Any, **kwargs: Any) -> tuple[tuple[np.ndarray, ...], ...]:
        return self.backend.linear_scan_vjp(*args, implementation=self.name, **kwargs)


def implementations(*twins: str) -> list[Any]:
    params = []
    for twin in twins:
        if twin not in BACKENDS:
            reason = pytest.mark.skip(reason=f"{twin} is not installed")
            params.append(pytest.param(None, id=twin, marks=reason))
            continue
        scan = importlib.import_module(f"recurrentgemma.{twin}.scan")
        for name in scan.IMPLEMENTATIONS:
            params.append(pytest.param(Implementation(BACKENDS[twin], name), id=f"{twin}-{name}"))
    return params


@pytest.fixture(scope="module", params=implementations(*TWINS))
def scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


class Case(NamedTuple):
    x: np.ndarray
    a: np.ndarray
    h0: np.ndarray
    reset: np.ndarray
    dy: np.ndarray
    dlast: np.ndarray


def make_case(batch: int, length: int, width: int) -> Case:
    """Resets at the first and the last step, and at two adjacent ones between, by row."""
    rng = np.random.default_rng(length)
    x, dy = rng.standard_normal((2, batch, length, width))
    h0, dlast = rng.standard_normal((2, batch, width))
    reset = np.zeros((batch, length), bool)
    middle = length // 2
    for row, steps in enumerate([[middle, min(middle + 1, length - 1)], [0], [length - 1]]):
        if row < batch:
            reset[row, steps] = True
    a = rng.uniform(0.2, 1, x.shape)
    return Case(x, a, h0, reset, dy, dlast)


def expected_grads(case: Case, reverse: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The adjoint recurrence, a step at a time."""
    order = range(case.x.shape[1])
    order = list(reversed(order) if reverse else order)
    y, _ = reference.linear_scan(case.x, case.a, case.h0, case.reset, reverse)
    dx, da = np.zeros_like(case.x), np.zeros_like(case.a)
    dh = case.dlast.copy()
    for i in reversed(range(len(order))):
        t = order[i]
        before = y[:, order[i - 1]] if i else case.h0
        kept = ~case.reset[:, t, None]
        dh = dh + case.dy[:, t]
        dx[:, t], da[:, t] = dh, kept * dh * before
        dh = kept * case.a[:, t] * dh
    return dx, da, dh


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
class TestScan:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_states_and_gradients(self, scan: Implementation, shape, reverse: bool) -> None:
        case = make_case(*shape)
        states, gradients = scan.vjp(*case[:4], dy=case.dy, dlast=case.dlast, reverse=reverse)
        expected = reference.linear_scan(*case[:4], reverse)
        for got, want in zip(states, expected, strict=True):
            assert_close(got, want, "state", "float64")
        expected = expected_grads(case, reverse)
        for name, got, want in zip(("x", "a", "h0"), gradients, expected, strict=True):
            assert_close(got, want, "gradient", "float64", name=name)

    @pytest.mark.parametrize("given", ["nothing", "h0", "reset"])
    def test_what_is_left_out(self, scan: Implementation, given: str, reverse: bool) -> None:
        case = make_case(3, 17, 96)
        h0 = case.h0 if given == "h0" else None
        reset = case.reset if given == "reset" else None
        actual = scan(case.x, case.a, h0, reset, reverse=reverse)
        expected = reference.linear_scan(case.x, case.a, h0, reset, reverse)
        for got, want in zip(actual, expected, strict=True):
            assert_close(got, want, "state", "float64")

    def test_float32(self, scan: Implementation, reverse: bool) -> None:
        case = make_case(3, 65, 96)
        states, gradients = scan.vjp(
            *case[:4], dy=case.dy, dlast=case.dlast, dtype="float32", reverse=reverse
        )
        for got, want in zip(states, reference.linear_scan(*case[:4], reverse), strict=True):
            assert_close(got, want, "state", "float32")
        for got, want in zip(gradients, expected_grads(case, reverse), strict=True):
            assert_close(got, want, "gradient", "float32")

    @pytest.mark.parametrize("shape", [(3, 7, 96), (1, 65, 96)], ids=str)
    def test_bfloat16_keeps_a_float32_state(
        self, scan: Implementation, shape, reverse: bool
    ) -> None:
        case = make_case(*shape)
        x, a = (bfloat16(value) for value in case[:2])
        y, last = scan(x, a, case.h0, case.reset, dtype="bfloat16", reverse=reverse)
        expected, expected_last = reference.linear_scan(x, a, case.h0, case.reset, reverse)
        assert_close(last, expected_last, "state", "float32")
        assert_close(y, expected, "scan", "bfloat16")
        np.testing.assert_array_equal(y, bfloat16(y))
        assert (last != bfloat16(last)).any()

    def test_no_steps(self, scan: Implementation, reverse: bool) -> None:
        case = make_case(3, 2, 5)
        x, a, reset = case.x[:, :0], case.a[:, :0], case.reset[:, :0]
        y, last = scan(x, a, case.h0, reset, reverse=reverse)
        assert y.shape == (3, 0, 5)
        np.testing.assert_array_equal(last, case.h0)
        _, zeros = scan(x, a, reverse=reverse)
        np.testing.assert_array_equal(zeros, np.zeros((3, 5)))
        _, gradients = scan.vjp(x, a, case.h0, reset, dy=x, dlast=case.dlast, reverse=reverse)
        dx, _, dh0 = gradients
        assert dx.shape == (3, 0, 5)
        np.testing.assert_array_equal(dh0, case.dlast)

    def test_long_products_underflow_quietly(self, scan: Implementation, reverse: bool) -> None:
        """Decays of many steps vanish in float32; the states do not."""
        case = make_case(3, 65, 96)
        case = case._replace(a=case.a * 1e-6, reset=np.zeros_like(case.reset))
        states, gradients = scan.vjp(
            *case[:4], dy=case.dy, dlast=case.dlast, dtype="float32", reverse=reverse
        )
        for got, want in zip(states, reference.linear_scan(*case[:4], reverse), strict=True):
            assert_close(got, want, "state", "float32")
        for got, want in zip(gradients, expected_grads(case, reverse), strict=True):
            assert_close(got, want, "gradient", "float32")


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

    def test_names(self, backend: Backend) -> None:
        case = make_case(1, 2, 1)
        with pytest.raises(
            ValueError, match=r"implementation must be one of .*reference.*, got 'quick'"
        ):
            backend.linear_scan(case.x, case.a, implementation="quick")


# ------------------------------------------------------------------------------------ transforms


@pytest.fixture(scope="module", params=implementations("torch"))
def torch_scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


@pytest.fixture(scope="module", params=implementations("jax"))
def jax_scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


def tensors(case: Case) -> Any:
    return BACKENDS["torch"].scan_arguments(*case[:4], "float64")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_torch_gradcheck(torch_scan: Implementation, length: int, reverse: bool) -> None:
    import torch

    from recurrentgemma.torch import linear_scan

    x, a, h0, reset = tensors(make_case(2, length, 1))

    def run(x, a, h0):
        return linear_scan(x, a, h0, reset, reverse=reverse, implementation=torch_scan.name)

    inputs = [value.requires_grad_() for value in (x, a, h0)]
    assert torch.autograd.gradcheck(run, inputs)


def torch_loss(scan: Implementation, case: Case, reverse: bool):
    from recurrentgemma.torch import linear_scan

    dy, dlast = (BACKENDS["torch"].array(value, "float64") for value in (case.dy, case.dlast))

    def loss(x, a, h0, reset):
        y, last = linear_scan(x, a, h0, reset, reverse=reverse, implementation=scan.name)
        return (y * dy).sum() + (last * dlast).sum()

    return loss


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [7, 65])
def test_torch_func_grad(torch_scan: Implementation, length: int, reverse: bool) -> None:
    import torch

    case = make_case(3, length, 5)
    loss = torch_loss(torch_scan, case, reverse)
    actual = torch.func.grad(loss, (0, 1, 2))(*tensors(case))
    for got, want in zip(actual, expected_grads(case, reverse), strict=True):
        assert_close(got.numpy(), want, "gradient", "float64")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [7, 65])
def test_torch_vmap(torch_scan: Implementation, length: int, reverse: bool) -> None:
    """Over cases that share the decays, mapped axes first and last; and its gradients."""
    import torch

    from recurrentgemma.torch import linear_scan

    case = make_case(3, length, 5)
    x, a, h0, reset = tensors(case)
    several = torch.stack([x, 2 * x, x.flip(0)], -1)
    starts = torch.stack([h0, h0 + 1, h0.flip(0)], 0)

    def run(x, a, h0, reset):
        return linear_scan(x, a, h0, reset, reverse=reverse, implementation=torch_scan.name)

    dims = (-1, None, 0, None)
    actual = torch.vmap(run, dims)(several, a, starts, reset)
    expected = [run(several[..., i], a, starts[i], reset) for i in range(3)]
    for got, want in zip(actual, zip(*expected, strict=True), strict=True):
        assert_close(got.numpy(), torch.stack(want).numpy(), "state", "float64")

    loss = torch_loss(torch_scan, case, reverse)
    each = [
        torch.func.grad(loss, (0, 1, 2))(several[..., i], a, starts[i], reset) for i in range(3)
    ]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(several, a, starts, reset)
    for got, want in zip(gradients, expected, strict=True):
        assert_close(got.numpy(), want.numpy(), "gradient", "float64")

    def total(x, a, h0, reset):
        return torch.vmap(loss, dims)(x, a, h0, reset).sum()

    dx, da, dh0 = torch.func.grad(total, (0, 1, 2))(several, a, starts, reset)
    assert_close(dx.movedim(-1, 0).numpy(), expected[0].numpy(), "gradient", "float64")
    assert_close(da.numpy(), expected[1].sum(0).numpy(), "gradient", "float64")
    assert_close(dh0.numpy(), expected[2].numpy(), "gradient", "float64")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_jax_jit_vmap_and_gradients(jax_scan: Implementation, reverse: bool) -> None:
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import linear_scan

    case = make_case(3, 9, 5)
    with jax.enable_x64(True):
        x, a, h0, reset = BACKENDS["jax"].scan_arguments(*case[:4], "float64")

        def run(x, a, h0, reset):
            return linear_scan(x, a, h0, reset, reverse=reverse, implementation=jax_scan.name)

        compiled = jax.jit(run)
        for got, want in zip(compiled(x, a, h0, reset), run(x, a, h0, reset), strict=True):
            assert_close(np.asarray(got), np.asarray(want), "state", "float64")

        several = jnp.stack([x, 2 * x, x[::-1]], -1)
        starts = jnp.stack([h0, h0 + 1, h0[::-1]], 0)
        axes = (-1, None, 0, None)
        actual = jax.jit(jax.vmap(run, axes))(several, a, starts, reset)
        expected = [compiled(several[..., i], a, starts[i], reset) for i in range(3)]
        for got, want in zip(actual, zip(*expected, strict=True), strict=True):
            assert_close(np.asarray(got), np.stack(want), "state", "float64")

        def loss(x, a, h0, reset):
            y, last = run(x, a, h0, reset)
            return jnp.vdot(y, case.dy) + jnp.vdot(last, case.dlast)

        def total(x, a, h0, reset):
            return jax.vmap(loss, axes)(x, a, h0, reset).sum()

        grad = jax.jit(jax.grad(loss, (0, 1, 2)))
        each = [grad(several[..., i], a, starts[i], reset) for i in range(3)]
        stacked = [np.stack(parts) for parts in zip(*each, strict=True)]
        dx, da, dh0 = jax.jit(jax.grad(total, (0, 1, 2)))(several, a, starts, reset)
        assert_close(np.moveaxis(np.asarray(dx), -1, 0), stacked[0], "gradient", "float64")
        assert_close(np.asarray(da), stacked[1].sum(0), "gradient", "float64")
        assert_close(np.asarray(dh0), stacked[2], "gradient", "float64")
        vmapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), axes))(several, a, starts, reset)
        for got, want in zip(vmapped, stacked, strict=True):
            assert_close(np.asarray(got), want, "gradient", "float64")
