"""Products in float32 on a CPU for which another library than PyTorch's own is faster."""

import io
from typing import Any

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch
from cases import make_config
from torch.nn.functional import linear as plain

from recurrentgemma.torch import Model
from recurrentgemma.torch.products import product
from recurrentgemma.torch.runtime import kernels
from recurrentgemma.torch.runtime import linear as fast
from tolerances import assert_close

SHAPES = [(1, 48), (7, 48), (2, 24, 48)]


@pytest.fixture(autouse=True)
def on_such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CPU takes that library, for small matrices too."""
    if not kernels.packed32_works():
        pytest.skip("oneDNN is not there")
    monkeypatch.setattr(kernels, "plain32_gains", lambda: True)
    monkeypatch.setattr(fast, "_LEAST", 0)


def arguments(shape: tuple[int, ...], bias: bool) -> Any:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return [drawn(*shape), drawn(32, 48), drawn(32) if bias else None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_both_derivatives(shape: tuple[int, ...], bias: bool) -> None:
    x, w, b = arguments(shape, bias)
    inputs = [z for z in (x, w, b) if z is not None]
    assert fast.gains(x, w)
    results = []
    for function in (fast.linear, plain):
        y = function(x, w, b)
        first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad([(z**2).sum() for z in first], inputs)
        results.append((y, *first, *second))
    for found, wanted in zip(*results, strict=True):
        assert_close(found.detach(), wanted.detach(), "gradient", "float32")
    with torch.no_grad():
        assert torch.equal(product(x, w, b, axis=-1), results[0][0])


def test_matrices_with_gaps_go_the_other_way() -> None:
    """As the blocks of a gate's inputs: oneDNN takes a second for such a product."""
    blocks, w = torch.randn(64, 2, 48).unbind(1)[1], torch.randn(32, 48)
    assert fast.gains(blocks.contiguous(), w)
    assert fast.gains(blocks.contiguous().t(), torch.randn(32, 64))
    assert not fast.gains(blocks, w)
    assert not fast.gains(w, blocks)
    assert not fast.gains(blocks.t(), torch.randn(32, 64))


@pytest.mark.parametrize("rows", [1, 5])
def test_stacks(rows: int) -> None:
    x, w = torch.randn(1, rows, 48, requires_grad=True), torch.randn(2, 48, 32, requires_grad=True)
    b = torch.randn(2, 1, 32, requires_grad=True)
    y, wanted = product(x, w, b), torch.baddbmm(b, x.expand(2, -1, -1), w)
    assert_close(y.detach(), wanted.detach(), "gradient", "float32")
    grads = (torch.autograd.grad((z**2).sum(), (x, w, b)) for z in (y, wanted))
    for found, grad in zip(*grads, strict=True):
        assert_close(found, grad, "gradient", "float32")


def test_results_may_be_changed_in_place() -> None:
    x, w, b = arguments((2, 24, 48), True)
    fast.linear(x, w, b).tanh_().sum().backward()
    assert w.grad.shape == w.shape


def test_what_only_pytorch_multiplies() -> None:
    x, w, _ = arguments((7, 48), False)
    assert not fast.gains(x.double(), w.double())
    assert not fast.gains(x.bfloat16(), w.bfloat16())
    assert not fast.gains(x[:0], w)
    with torch.autocast("cpu"):
        assert not fast.gains(x, w)
    with torch.autograd.forward_ad.dual_level():
        assert not fast.gains(x, w)

    def inside(x: torch.Tensor) -> torch.Tensor:
        assert not fast.gains(x, w)
        return product(x, w, axis=-1).sum()

    wanted = torch.autograd.grad(plain(x, w).sum(), x)[0]
    assert torch.allclose(torch.func.grad(inside)(x.detach()), wanted)


def test_exported_programs_take_it_nowhere() -> None:
    model = Model(make_config("RA", vocab_size=64, width=64, mlp_expanded_width=96)).eval()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    inputs = tokens, torch.arange(4)[None]
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("linear32" in name or "mkldnn" in name for name in names)
    file = io.BytesIO()
    torch.export.save(program, file)


@pytest.mark.parametrize("text", ["vendor_id : GenuineIntel", "vendor_id : AuthenticAMD", ""])
def test_the_vendor_decides(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Path, "read_text", lambda *_: text)
    assert kernels._is_from_intel() == ("AMD" not in text)
