"""Derivatives in forward mode, alone and around reverse mode, as users of either framework ask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import make_config
from scans import (
    Implementation,
    implementations,
    linear_scan_grads,
    make_rg_lru,
    make_scan,
    rg_lru_scan_grads,
)
from sweeps import LONG, sweep
from trainers import make_batch

from backends import BACKENDS, Backend
from backends.jax import jax_implementation
from backends.torch import TorchBackend
from tolerances import assert_close

# The rules are the same for all implementations; others take seconds for each derivative.
QUICK = [p for p in implementations() if str(p.id).endswith(("xla", "native"))]
OTHERS = [p for p in implementations() if p not in QUICK]
# PyTorch warns of what its own forward mode does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]
Arrays = tuple[Any, ...]


class Derivatives:
    """A framework's own functions of derivatives, on its arrays."""

    def __init__(self, backend: Backend) -> None:
        if backend.name == "jax":
            import jax

            self.jvp, self.linearize, self.vmap = jax.jvp, jax.linearize, jax.vmap
            self.grad, self.hessian, self.compiled = jax.grad, jax.hessian, jax.jit
        else:
            import torch

            self.jvp, self.linearize = torch.func.jvp, torch.func.linearize
            self.grad, self.hessian = torch.func.grad, torch.func.hessian
            self.vmap, self.compiled = torch.func.vmap, lambda function: function

    def all(self, scan: Callable[..., Any], inputs: Arrays, tangents: Arrays, dy, dlast) -> Any:
        """The tangents of `scan` three times, and second derivatives of a loss three times."""
        every = tuple(range(len(inputs)))

        def loss(*inputs):
            y, last = scan(*inputs)
            return (y * y * dy).sum() + (last * last * dlast).sum()

        def slope(*inputs):
            return self.jvp(loss, inputs, tangents)[1]

        def tangents_of(*tangents):
            return self.jvp(scan, inputs, tangents)[1]

        several = tuple(t[None] for t in tangents)
        return (
            tangents_of(*tangents),
            self.linearize(scan, *inputs)[1](*tangents),
            tuple(z[0] for z in self.vmap(tangents_of)(*several)),
            self.jvp(self.grad(loss, every), inputs, tangents)[1],
            self.grad(slope, every)(*inputs),
            self.jvp(slope, inputs, tangents)[1],
        )


@contextlib.contextmanager
def implemented(backend: Backend, name: str) -> Iterator[str]:
    """Runs an implementation, interpreted if it is a kernel; yields the package's name for it."""
    if isinstance(backend, TorchBackend):
        with backend.running(implementation=name):
            yield name
    else:
        with jax_implementation(name) as chosen:
            yield chosen


def along(one: Any, other: Any) -> float:
    return sum(
        float((np.asarray(a) * np.asarray(b)).sum()) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("function", ["reverse linear_scan", "rg_lru_scan"])
@pytest.mark.parametrize("implementation", QUICK)
def test_scans(implementation: Implementation, function: str) -> None:
    """Tangents fit the analytic gradients; second derivatives fit their finite differences."""
    backend = implementation.backend
    options: dict[str, Any] = {"implementation": implementation.name}
    case: Any = (make_rg_lru if function == "rg_lru_scan" else make_scan)(2, 11, 3)
    if function == "rg_lru_scan":
        varied = ["x", "input_gate", "a_gate", "a_param", "h0"]
    else:
        case.a[0, 3] = 0
        options["reverse"] = function.startswith("reverse")
        varied = ["x", "a", "h0"]

    def gradients_of(case: Any) -> tuple[np.ndarray, ...]:
        if function == "rg_lru_scan":
            return rg_lru_scan_grads(case)
        return linear_scan_grads(case, options["reverse"])

    rng = np.random.default_rng(1)
    moves = {name: rng.standard_normal(getattr(case, name).shape) for name in varied}

    with backend.precision("float64"):
        make: Any = backend.scan_arguments if len(varied) == 3 else backend.rg_lru_arguments
        arguments = make(*case.inputs, "float64")
        names = case._fields[: len(arguments)]
        place = next(i for i, name in enumerate(names) if name not in varied)
        mask = arguments[place]
        inputs = tuple(z for i, z in enumerate(arguments) if i != place)
        tangents, dy, dlast = (
            tuple(backend.array(z, "float64") for z in moves.values()),
            backend.array(case.dy, "float64"),
            backend.array(case.dlast, "float64"),
        )

        def scan(*inputs):
            run = getattr(backend.module, function.split()[-1])
            return run(*inputs[:place], mask, *inputs[place:], **options)

        tools = Derivatives(backend)

        def everything(inputs, tangents):
            return tools.all(scan, inputs, tangents, dy, dlast)

        found = backend.to_numpy(tools.compiled(everything)(inputs, tangents))
    first, linear, mapped, forward_over_reverse, reverse_over_forward, second = found
    for others in zip(first, linear, mapped, strict=True):
        for got in others[1:]:
            assert_close(got, others[0], "gradient", "float64")
    gradients = gradients_of(case)
    assert_close(along(first, case[-2:]), along(gradients, moves.values()), "gradient", "float64")
    for got, want in zip(forward_over_reverse, reverse_over_forward, strict=True):
        assert_close(got, want, "gradient", "float64")
    assert_close(along(forward_over_reverse, moves.values()), second, "gradient", "float64")

    def slope(by: float) -> float:
        moved = case._replace(**{n: getattr(case, n) + by * d for n, d in moves.items()})
        y, last = implementation_free(function, moved)
        weights = moved._replace(dy=2 * y * case.dy, dlast=2 * last * case.dlast)
        return along(gradients_of(weights), moves.values())

    assert_close((slope(1e-5) - slope(-1e-5)) / 2e-5, second, "slope", "float64")


@pytest.mark.parametrize("function", sweep(["rg_lru_scan"], ["rg_lru_scan", "linear_scan"]))
@pytest.mark.parametrize("implementation", OTHERS)
def test_every_implementation(implementation: Implementation, function: str) -> None:
    """Tangents are those of the quick implementation, kernels too.

    So is a Hessian times a vector; Pallas, interpreted, takes 10 s for it, and a long sweep has it.
    """
    twice = LONG or not implementation.name.startswith("pallas")
    backend, dtype = implementation.backend, implementation.dtype
    case: Any = (make_rg_lru if function == "rg_lru_scan" else make_scan)(1, 3, 2)
    make: Any = backend.rg_lru_arguments if len(case) == 8 else backend.scan_arguments
    tools, quick = Derivatives(backend), {"jax": "xla", "torch": "native"}[backend.name]

    def derivatives(name: str) -> Any:
        with backend.precision(dtype), implemented(backend, name) as chosen:
            run = getattr(backend.module, function)
            place = 1 if function == "linear_scan" else 2
            inputs = make(*case.inputs, dtype)

            def loss(varied):
                args = [varied if i == place else z for i, z in enumerate(inputs)]
                return (run(*args, implementation=chosen)[0] ** 2).sum()

            def both(varied, direction):
                slope = tools.jvp(loss, (varied,), (direction,))[1]
                if not twice:
                    return (slope,)
                return slope, tools.jvp(tools.grad(loss), (varied,), (direction,))[1]

            return backend.to_numpy(tools.compiled(both)(inputs[place], inputs[0]))

    for got, want in zip(derivatives(implementation.name), derivatives(quick), strict=True):
        assert_close(got, want, "gradient", dtype)


def implementation_free(function: str, case: Any) -> tuple[np.ndarray, np.ndarray]:
    """The outputs as the reference defines them."""
    from recurrentgemma.common.model import reference

    if function == "rg_lru_scan":
        return reference.rg_lru_scan(*case.inputs)
    return reference.linear_scan(*case.inputs, reverse=function.startswith("reverse"))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_hessian(backend: Backend) -> None:
    """All second derivatives at once: `vmap` of forward over reverse."""
    case = make_scan(1, 3, 2)
    with backend.precision("float64"):
        make: Any = backend.scan_arguments
        x, a, h0, _ = make(*case.inputs, "float64")

        def loss(a):
            return (backend.module.linear_scan(x, a, h0)[0] ** 3).sum()

        hessian = backend.to_numpy(Derivatives(backend).hessian(loss)(a))
        step = np.zeros_like(case.a)
        step[0, 1, 0] = 1e-5
        slopes = [
            backend.to_numpy(Derivatives(backend).grad(loss)(backend.array(z, "float64")))
            for z in (case.a + step, case.a - step)
        ]
    assert_close((slopes[0] - slopes[1]) / 2e-5, hessian[0, 1, 0], "slope", "float64")


def test_models() -> None:
    """Both twins: the tangents of a model, and of its training loss twice."""
    config = make_config("RA")
    batch = make_batch(config, 0)
    found = []
    for backend in BACKENDS.values():
        with backend.precision("float64"):
            found.append(model_derivatives(backend, config, batch))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_close(got, want, "gradient", "float64")


def model_derivatives(backend: Backend, config: Any, batch: Any) -> Any:
    """Along one direction for the table of embeddings: of the logits, the loss, its gradient."""
    tools, name = Derivatives(backend), "embedder.input_embedding"
    values = np.random.default_rng(0).standard_normal((config.vocab_size, config.width))
    direction = backend.array(values, "float64")
    if backend.name == "jax":
        from recurrentgemma.jax import Griffin, init_params, loss_fn

        model, params = Griffin(config), init_params(config, 0, "float64")
        table = params["embedder"]["input_embedding"]

        def changed(table):
            return {**params, "embedder": {"input_embedding": table}}

        def logits(table):
            return model.apply({"params": changed(table)}, batch.tokens, batch.segment_pos)[0]

        def loss(table):
            return loss_fn(model, changed(table), batch)[0]
    else:
        import torch

        from recurrentgemma.torch import loss_fn

        model, _ = backend.raw_griffin(config, backend.init_params(config, 0, "float64"), "float64")
        table = model.get_parameter(name).detach()

        class Loss(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self):
                return loss_fn(self.model, batch)[0]

        def logits(table):
            places = torch.from_numpy(batch.tokens), torch.from_numpy(batch.segment_pos)
            return torch.func.functional_call(model, {name: table}, places)[0]

        def loss(table):
            return torch.func.functional_call(Loss(), {f"model.{name}": table}, ())

    def all_of_them(table):
        return (
            tools.jvp(logits, (table,), (direction,))[1],
            tools.jvp(loss, (table,), (direction,))[1],
            tools.jvp(tools.grad(loss), (table,), (direction,))[1],
        )

    found = backend.to_numpy(tools.compiled(all_of_them)(table))
    if backend.name == "torch":
        from torch.autograd import forward_ad

        with forward_ad.dual_level():  # the older way, without torch.func
            dual = loss(forward_ad.make_dual(table, direction))
            tangent = forward_ad.unpack_dual(dual).tangent.detach()
        assert_close(float(tangent), found[1], "gradient", "float64")
    return found
