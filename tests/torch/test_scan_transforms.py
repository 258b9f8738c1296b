"""The recurrence under torch's transforms: gradcheck, torch.func.grad and vmap."""

import functools
from typing import Any

import pytest
from scans import (
    Implementation,
    ScanCase,
    both_ways,
    each,
    implementations,
    in_turn,
    linear_scan_grads,
    make_rg_lru,
    make_scan,
)
from sweeps import sweep

from backends import BACKENDS
from tolerances import assert_close

pytest.importorskip("torch.nn", reason="torch is not installed")

FAST = sweep(True, False)  # along random directions, not entry by entry of the Jacobian


@pytest.fixture(scope="module", params=implementations("torch"))
def torch_scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


def only(*names: str) -> pytest.MarkDecorator:
    """Those that are operators: others are made of torch's own, as many as the length asks for."""
    every = implementations("torch", auto=True)
    chosen = [param for param in every if str(param.id).endswith(names)]
    return pytest.mark.parametrize("torch_scan", chosen, indirect=True)


# Interpreted kernels are slow: fewer cases, and shorter ones.
torch_each = functools.partial(each, scan="torch_scan")


def tensors(case: ScanCase) -> Any:
    return BACKENDS["torch"].scan_arguments(*case.inputs, dtype="float64")


@torch_each("length,reverse", both_ways([(1,), (5,), (40,)]), in_turn([(1,), (5,)]), "torch")
def test_gradcheck(torch_scan: Implementation, length: int, reverse: bool) -> None:
    import torch

    from recurrentgemma.torch import linear_scan

    x, a, h0, reset = tensors(make_scan(2, length, 1))

    def run(x, a, h0):
        return linear_scan(x, a, h0, reset, reverse=reverse, implementation=torch_scan.name)

    inputs = [value.requires_grad_() for value in (x, a, h0)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=FAST)
    if torch_scan.name != "triton":
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=FAST)


@pytest.mark.parametrize("length", [1, 5, 20])
def test_rg_lru_gradcheck(torch_scan: Implementation, length: int) -> None:
    import torch

    from recurrentgemma.torch import rg_lru_scan

    if torch_scan.name == "triton":
        pytest.skip("interpreted kernels are slow")
    case = make_rg_lru(2, length, 2)
    *inputs, segment_pos, h0 = BACKENDS["torch"].rg_lru_arguments(*case.inputs, dtype="float64")

    def run(x, input_gate, a_gate, a_param, h0):
        return rg_lru_scan(
            x, input_gate, a_gate, a_param, segment_pos, h0, implementation=torch_scan.name
        )

    inputs = [value.requires_grad_() for value in (*inputs, h0)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=FAST)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=FAST)


@pytest.mark.parametrize("length", [1, 17])
def test_rg_lru_vmap_of_func_grad(torch_scan: Implementation, length: int) -> None:
    """Over inputs and parameters, against each gradient alone."""
    import torch

    from recurrentgemma.torch import rg_lru_scan

    if torch_scan.name == "triton" and length > 1:
        pytest.skip("interpreted kernels are slow")
    case = make_rg_lru(2, length, 3)
    x, i, r, p, segment_pos, h0 = BACKENDS["torch"].rg_lru_arguments(*case.inputs, dtype="float64")

    def loss(x, a_param):
        y, last = rg_lru_scan(x, i, r, a_param, segment_pos, h0, implementation=torch_scan.name)
        return y.square().sum() + last.sum()

    grad = torch.func.grad(loss, (0, 1))
    for dims in ((0, None), (0, 0)):
        params = torch.stack([p, p + 1]) if dims[1] == 0 else p
        actual = torch.vmap(grad, dims)(torch.stack([x, 2 * x]), params)
        each = [grad((1 + k) * x, params[k] if dims[1] == 0 else p) for k in range(2)]
        for got, want in zip(actual, zip(*each, strict=True), strict=True):
            assert_close(got.numpy(), torch.stack(want).numpy(), "gradient", "float64")


def torch_loss(scan: Implementation, case: ScanCase, reverse: bool):
    from recurrentgemma.torch import linear_scan

    dy, dlast = (BACKENDS["torch"].array(value, "float64") for value in (case.dy, case.dlast))

    def loss(x, a, h0, reset):
        y, last = linear_scan(x, a, h0, reset, reverse=reverse, implementation=scan.name)
        return (y * dy).sum() + (last * dlast).sum()

    return loss


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [7, "several"])
def test_func_grad(torch_scan: Implementation, length: int | str, reverse: bool) -> None:
    import torch

    case = make_scan(3, torch_scan.steps(length), 5)
    loss = torch_loss(torch_scan, case, reverse)
    actual = torch.func.grad(loss, (0, 1, 2))(*tensors(case))
    for got, want in zip(actual, linear_scan_grads(case, reverse), strict=True):
        assert_close(got.numpy(), want, "gradient", "float64")


@torch_each(
    "length,reverse", both_ways([(7,), (65,)]), sweep([(5, True)], both_ways([(7,)])), "torch"
)
def test_vmap(torch_scan: Implementation, length: int, reverse: bool) -> None:
    """Over cases that share the decays, mapped axes first and last; and its gradients."""
    import torch

    from recurrentgemma.torch import linear_scan

    case = make_scan(3, length, 5)
    x, a, h0, reset = tensors(case)
    several = torch.stack([x, 2 * x, x.flip(0)], -1)
    starts = torch.stack([h0, h0 + 1, h0.flip(0)], 0)

    def run(x, a, h0, reset):
        return linear_scan(x, a, h0, reset, reverse=reverse, implementation=torch_scan.name)

    dims = (-1, None, 0, None)
    nothing = torch.vmap(run, dims)(several[..., :0], a, starts[:0], reset)
    assert [z.shape for z in nothing] == [(0, *x.shape), (0, *h0.shape)]
    actual = torch.vmap(run, dims)(several, a, starts, reset)
    expected = [run(several[..., i], a, starts[i], reset) for i in range(3)]
    for got, want in zip(actual, zip(*expected, strict=True), strict=True):
        assert_close(got.numpy(), torch.stack(want).numpy(), "state", "float64")

    loss = torch_loss(torch_scan, case, reverse)
    each = [
        torch.func.grad(loss, (0, 1, 2))(several[..., i], a, starts[i], reset) for i in range(3)
    ]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    mapped_grad = torch.vmap(torch.func.grad(loss, (0, 1, 2)), dims)
    nothing = mapped_grad(several[..., :0], a, starts[:0], reset)
    assert [z.shape for z in nothing] == [(0, *z.shape) for z in (x, a, h0)]
    gradients = mapped_grad(several, a, starts, reset)
    for got, want in zip(gradients, expected, strict=True):
        assert_close(got.numpy(), want.numpy(), "gradient", "float64")

    def total(x, a, h0, reset):
        return torch.vmap(loss, dims)(x, a, h0, reset).sum()

    dx, da, dh0 = torch.func.grad(total, (0, 1, 2))(several, a, starts, reset)
    assert_close(dx.movedim(-1, 0).numpy(), expected[0].numpy(), "gradient", "float64")
    assert_close(da.numpy(), expected[1].sum(0).numpy(), "gradient", "float64")
    assert_close(dh0.numpy(), expected[2].numpy(), "gradient", "float64")


@pytest.mark.parametrize("function", ["linear_scan", "rg_lru_scan"])
def test_autocast(torch_scan: Implementation, function: str) -> None:
    """Beside operations that autocast narrows the recurrence keeps the dtypes of its arguments."""
    import torch

    import recurrentgemma.torch

    scan = getattr(recurrentgemma.torch, function)
    if function == "linear_scan":
        arguments = BACKENDS["torch"].scan_arguments(*make_scan(2, 5, 4).inputs, dtype="float32")
    else:
        arguments = BACKENDS["torch"].rg_lru_arguments(
            *make_rg_lru(2, 5, 4).inputs, dtype="float32"
        )

    def run(x, *others):
        x.requires_grad_()
        y, last = scan(x, *others, implementation=torch_scan.name)
        (dx,) = torch.autograd.grad(y.sum() + last.sum(), x)
        return y.detach(), last.detach(), dx

    with torch.autocast("cpu", torch.bfloat16):
        actual = run(*arguments)
    for got, want in zip(actual, run(*arguments), strict=True):
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want)


@only("auto", "native", "triton")
@pytest.mark.usefixtures("unchecked_types")  # sizes are symbols
@pytest.mark.parametrize("function", ["linear_scan", "rg_lru_scan"])
def test_export(torch_scan: Implementation, function: str) -> None:
    """A program of any length is exported whole, without a loop over time; it computes the same."""
    import torch

    import recurrentgemma.torch

    scan = getattr(recurrentgemma.torch, function)

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return scan(*arguments, implementation=torch_scan.name)

    def arguments(length: int):
        if function == "linear_scan":
            case = make_scan(2, length, 4)
            return BACKENDS["torch"].scan_arguments(*case.inputs, dtype="float32")
        case = make_rg_lru(2, length, 4)
        return BACKENDS["torch"].rg_lru_arguments(*case.inputs, dtype="float32")

    time = torch.export.Dim("time", min=2)
    with_time = [{1: time} if z.ndim > 1 and z.shape[1] == 5 else None for z in arguments(5)]
    program = torch.export.export(Module(), arguments(5), dynamic_shapes=(tuple(with_time),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(f"recurrentgemma.{function}" in target for target in targets) == 1
    for got, want in zip(program.module()(*arguments(9)), Module()(*arguments(9)), strict=True):
        torch.testing.assert_close(got, want)

    def gradients(module) -> tuple[torch.Tensor, ...]:
        leaves = [z.requires_grad_() for z in arguments(9) if z.is_floating_point()]
        others = [z for z in arguments(9) if not z.is_floating_point()]
        ordered = leaves + others if function == "linear_scan" else leaves[:4] + others + leaves[4:]
        y, last = module(*ordered)
        return torch.autograd.grad(y.sum() + last.sum(), leaves)

    for got, want in zip(gradients(program.module()), gradients(Module()), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("function", ["linear_scan", "rg_lru_scan"])
def test_outputs_share_no_memory(torch_scan: Implementation, function: str, length: int) -> None:
    """Neither with each other nor with an argument."""
    import torch

    import recurrentgemma.torch

    scan = getattr(recurrentgemma.torch, function)
    x, h0 = torch.rand(2, length, 3), torch.rand(2, 3)
    if function == "linear_scan":
        arguments = x, torch.rand_like(x), h0
    else:
        segment_pos = torch.arange(7, 7 + length).expand(2, length)
        arguments = x, torch.rand_like(x), torch.rand_like(x), torch.rand(3), segment_pos, h0
    y, last = scan(*arguments, implementation=torch_scan.name)
    others = y, *arguments
    before = [z.clone() for z in others]
    last.zero_()
    assert all(map(torch.equal, others, before))
    y.zero_()
    assert all(map(torch.equal, arguments, before[1:]))


@only("native", "triton")
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize(
    "name", ["linear_scan", "linear_scan_backward", "rg_lru_scan", "rg_lru_scan_backward"]
)
def test_operators_keep_what_they_promise(
    torch_scan: Implementation, name: str, strides: str
) -> None:
    """What a compiled program relies on: shapes, dtypes and strides, whatever those of inputs."""
    import torch

    for length in (1, 5, 40):
        if torch_scan.name == "triton" and length > 5:
            continue  # interpreted kernels are slow

        def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            if strides == "expanded":
                return torch.rand(shape[-1]).to(dtype).expand(shape)
            if strides == "transposed":
                return torch.rand(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])
            return torch.rand(shape).to(dtype)

        def sequence(length: int = length) -> torch.Tensor:
            return values(2, length, 3)

        def state() -> torch.Tensor:
            return values(2, 3)

        segment_pos = values(2, length, dtype=torch.int64)
        reset = values(2, length, dtype=torch.bool)
        gates = sequence(), sequence(), sequence(), state(), segment_pos, state()
        arguments = {
            "linear_scan": (sequence(), sequence(), state(), reset, True),
            "linear_scan_backward": (
                *(sequence(), state(), sequence(), state(), None, sequence()),
                False,
            ),
            "rg_lru_scan": gates,
            "rg_lru_scan_backward": (sequence(), state(), *gates, sequence()),
        }
        torch.library.opcheck(
            getattr(torch.ops.recurrentgemma, name).default,
            (*arguments[name], torch_scan.name),
            test_utils=("test_schema", "test_faketensor"),
        )
