"""Products of a few rows with quantised matrices by Triton: interpreted, or on a GPU.

`TRITON_INTERPRET=0 pytest tests/torch/test_few_rows.py` runs the compiled kernel where a GPU is.
"""

import os

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
import numpy as np
import torch
from cases import make_config, make_params, make_tokens, positions

from backends import BACKENDS
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import (
    SCHEMES,
    Quantized,
    dequantize,
    quantize,
    quantize_parameter,
)
from recurrentgemma.common.quantization import product as definition
from recurrentgemma.torch.products import product
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime import few_rows
from recurrentgemma.torch.runtime.arrays import to_tensor
from tolerances import assert_close

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda:0")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)
# Inputs and outputs that blocks do not divide, stacks, less than a group, and several blocks.
SHAPES = {
    "q8": ((7, 5), (48, 20), (2, 160, 17)),
    "q4": ((16, 3), (2, 96, 17), (256, 20)),
    "q4_32": ((16, 3), (2, 96, 17)),
}
CASES = [(scheme, shape) for scheme, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the kernel, which takes the place of the CPU's own products."""
    found: list[int] = []
    kernel = few_rows._by_kernel

    def counted(x, *others):
        found.append(x.shape[1])
        return kernel(x, *others)

    monkeypatch.setattr(few_rows, "DEVICES", (DEVICE.type,))
    monkeypatch.setattr(few_rows, "_found", {})
    # The interpreter has no arithmetic in bfloat16.
    dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
    monkeypatch.setattr(few_rows, "_DTYPES", dtypes)
    for scheme in SCHEMES:
        for dtype in dtypes:
            few_rows._found[DEVICE, scheme, dtype] = True
    monkeypatch.setattr(few_rows, "_by_kernel", counted)
    return found


def drawn(shape: tuple[int, ...], scheme: str, rows: int):
    """Rows, a quantised stack of matrices or one matrix, and the same as a module."""
    rng = np.random.default_rng(0)
    w = quantize(rng.normal(size=shape).astype(np.float32), scheme)
    x = rng.normal(size=(*shape[:-2], rows, shape[-2])).astype(np.float32)
    return x, w.replace(integer=False), QuantizedMatrix(w.with_parts(to_tensor)).to(DEVICE)


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=str)
def test_the_definition_whatever_the_rows(
    scheme: str, shape: tuple[int, ...], calls: list[int]
) -> None:
    """No bit of a row's result depends on how many rows there are."""
    x, quantized, w = drawn(shape, scheme, few_rows.FEW)
    rows = torch.from_numpy(x).to(DEVICE)
    y = product(rows, w)
    assert_close(y.cpu().numpy(), definition(x, quantized), "logits", "float32")
    for count in (1, 5):
        assert torch.equal(product(rows[..., 3 : 3 + count, :], w), y[..., 3 : 3 + count, :])
    assert calls == [few_rows.FEW, 1, 5]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_narrow_rows_and_more_rows(scheme: str, calls: list[int]) -> None:
    """Sums are in float32 in every dtype; from 17 rows on the matrix is dequantised."""
    x, _, w = drawn((2, 64, 6), scheme, few_rows.FEW + 1)
    shared = torch.from_numpy(x[:1]).to(DEVICE, few_rows._DTYPES[-1])
    w = w.to(shared.dtype)
    y = product(shared[:, :3], w, dtype=torch.float32)
    exact = dequantize(w.quantized, torch.stack).double()
    expected = shared[:, :3].double() @ exact
    torch.testing.assert_close(y.double(), expected, rtol=2**-18, atol=2**-16)
    narrow = product(shared[:, :3], w)
    assert narrow.dtype == shared.dtype
    torch.testing.assert_close(narrow, y.to(shared.dtype), rtol=0, atol=0)
    many = product(shared, w)
    torch.testing.assert_close(many[:, :3], narrow, rtol=2**-6, atol=2**-6)
    assert calls == [3, 3]


def test_slopes_and_transforms_are_those_of_the_dequantised_product(calls: list[int]) -> None:
    x, _, w = drawn((64, 6), "q4_32", 3)
    rows = torch.from_numpy(x).to(DEVICE).requires_grad_()
    y = product(rows, w)
    exact = dequantize(w.quantized, torch.stack)
    torch.testing.assert_close(y, rows @ exact)
    (gradient,) = torch.autograd.grad(y.sum(), rows)
    torch.testing.assert_close(gradient, exact.sum(1).expand(3, -1))
    mapped = torch.vmap(lambda row: product(row[None], w)[0])(rows.detach())
    torch.testing.assert_close(mapped, y.detach())
    assert calls == [3]


class Head(torch.nn.Module):
    def __init__(self, w: QuantizedMatrix) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.w)


@pytest.mark.usefixtures("unchecked_types")
@torch.no_grad()
def test_traced_programs_keep_the_operator(calls: list[int]) -> None:
    """One exported program serves few rows and many."""
    x, quantized, w = drawn((64, 6), "q4_32", few_rows.FEW + 1)
    rows, head = torch.from_numpy(x).to(DEVICE), Head(w)
    traced = [
        torch.compile(head, backend="aot_eager", fullgraph=True),
        torch.export.export(
            head, (rows,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
        ).module(),
    ]
    for program in traced:
        for count in (2, len(rows)):
            y = program(rows[:count]).cpu().numpy()
            assert_close(y, definition(x[:count], quantized), "logits", "float32")
    assert calls == [2, 2]


def test_a_kernel_that_fails_or_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    x, quantized, w = drawn((96, 6), "q4_32", 3)
    rows, kernel = torch.from_numpy(x).to(DEVICE), few_rows._by_kernel
    kind = DEVICE, "q4_32", torch.float32

    def fails(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    def is_wrong(*arguments):
        return kernel(*arguments) * (1 + 2**-12)

    for broken in (fails, is_wrong):
        monkeypatch.setattr(few_rows, "_found", {})
        monkeypatch.setattr(few_rows, "_by_kernel", broken)
        y = product(rows, w)
        assert few_rows._found == {kind: False}
        assert_close(y.cpu().numpy(), definition(x, quantized), "logits", "float32")
    monkeypatch.setattr(few_rows, "_by_kernel", kernel)
    monkeypatch.setattr(few_rows, "_found", {})
    assert few_rows.kernel_works(*kind)
    assert not few_rows.kernel_works(DEVICE, "q8", torch.float64)


def test_a_model_decodes(calls: list[int]) -> None:
    """Every matrix of a model goes through the kernel, and no other copy of it is kept."""
    config = make_config("RA", width=32, mlp_expanded_width=32, num_heads=2, vocab_size=32)
    params, specs = make_params(config), layer_spec(config)
    held = {spec.path: quantize_parameter(spec, params[spec.path], "q4") for spec in specs}
    dense = {
        path: dequantize(value) if isinstance(value, Quantized) else value
        for path, value in held.items()
    }
    tokens, places = make_tokens(config, 2, 3), np.array([positions([3])] * 2)
    expected, _ = reference.forward(config, dense, tokens, places)
    twin = BACKENDS["torch"].twin
    model = twin.make(config, held.items(), "float32").to(DEVICE)
    size = sum(buffer.nbytes for buffer in model.buffers())
    with torch.no_grad():
        logits, _ = model(*(torch.from_numpy(z).to(DEVICE) for z in (tokens, places)))
    assert_close(logits.cpu().numpy(), expected, "logits", "float32")
    assert len(calls) == sum(isinstance(value, Quantized) for value in held.values())
    assert sum(buffer.nbytes for buffer in model.buffers()) == size
