"""Products with quantised matrices by each way that a CPU has for them."""

import copy
import pickle

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import numpy as np
import torch

from recurrentgemma.common.quantization import dequantize, quantize
from recurrentgemma.common.quantization import product as definition
from recurrentgemma.torch.products import product
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime import kernels, steps
from recurrentgemma.torch.runtime.arrays import to_tensor

SHAPES = ((320, 64), (2, 64, 128), (4, 128, 64))


def drawn(shape: tuple[int, ...], scheme: str, rows: int = 5):
    """Rows, and a quantised stack of matrices or one matrix."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(*shape[:-2], rows, shape[-2])).astype(np.float32)
    x[..., 0, :] = 0
    return x, quantize(w, scheme)


@pytest.mark.parametrize("way", ["packed", "plain", "exact"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q8_is_the_definition_to_the_bit(
    shape: tuple[int, ...], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = {"packed": kernels.packed8_works, "plain": kernels.plain8_works}
    if way != "exact" and not works[way]():
        pytest.skip("this PyTorch or processor has no exact products of int8")
    monkeypatch.setattr(kernels, "_LEAST8", 0 if way == "packed" else 2**60)
    if way == "exact":
        monkeypatch.setattr(kernels, "plain8_works", lambda: False)
    x, quantized = drawn(shape, "q8")
    w = QuantizedMatrix(quantized.with_parts(to_tensor))
    with torch.no_grad():
        y = product(torch.from_numpy(x), w)
        rows = [product(torch.from_numpy(x[..., i : i + 1, :]), w) for i in range(x.shape[-2])]
    assert (w.pack() is not None) == (way == "packed")
    np.testing.assert_array_equal(y.numpy(), definition(x, quantized))
    assert torch.equal(torch.cat(rows, -2), y)


@pytest.mark.parametrize("scheme", ["q4", "q4_32"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_four_bits_are_as_exact_as_bfloat16(
    shape: tuple[int, ...], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many rows as exact as float32: the matrix is dequantised, here in blocks of outputs."""
    monkeypatch.setattr(kernels, "_PART", 1)
    x, quantized = drawn(shape, scheme)
    w = QuantizedMatrix(quantized.with_parts(to_tensor))
    with torch.no_grad():
        y = product(torch.from_numpy(x), w).numpy()
        many = product(torch.from_numpy(x).repeat_interleave(100, -2), w).numpy()[..., ::100, :]
    expected = definition(x, quantized)
    assert np.abs(y - expected).max() < 2**-7 * np.abs(expected).max()
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_first", [True, False])
@pytest.mark.parametrize("scheme", ["q8", "q4"])
def test_a_stack_takes_the_same_rows_or_rows_for_each_matrix(
    scheme: str, shared_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows have it packed as one matrix of all outputs, whose values outlive that."""
    monkeypatch.setattr(kernels, "_LEAST8", 0)
    x, quantized = drawn((3, 128, 64), scheme)
    w = QuantizedMatrix(quantized.with_parts(to_tensor))
    several = torch.from_numpy(x)
    shared = several[1:2]
    with torch.no_grad():
        for rows in (shared, several, shared) if shared_first else (several, shared, several):
            expected = definition(rows.expand(3, -1, -1).numpy(), quantized)
            error = np.abs(product(rows, w).numpy() - expected).max()
            assert error <= (0 if scheme == "q8" else 2**-7 * np.abs(expected).max())
    np.testing.assert_array_equal(w.state_dict()["values"].numpy(), quantized.values)


@pytest.mark.parametrize("scheme", ["q8", "q4"])
def test_rows_that_change_are_not_taken_for_those_before(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_LEAST8", 0)
    x, quantized = drawn((128, 64), scheme)
    w = QuantizedMatrix(quantized.with_parts(to_tensor))
    rows = torch.from_numpy(x)
    with torch.no_grad(), steps.giving_up():
        for _ in range(2):
            expected = product(rows.clone(), w)
            assert torch.equal(product(rows, w), expected)
            assert torch.equal(product(rows[1:], w), expected[1:])
            rows.neg_()


@pytest.mark.parametrize("scheme", ["q8", "q4", "q4_32"])
def test_values_outlive_their_packing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LEAST8", 0)
    x, quantized = drawn((2, 128, 192), scheme)
    w = QuantizedMatrix(quantized.with_parts(lambda part: to_tensor(part.copy())))
    rows = torch.from_numpy(x)
    with torch.no_grad():
        y = product(rows, w)
        np.testing.assert_array_equal(w.quantized.values.numpy(), quantized.values)
        others = [copy.deepcopy(w), pickle.loads(pickle.dumps(w))]
        for other in others:
            assert torch.equal(product(rows, other), y)
            np.testing.assert_array_equal(other.state_dict()["values"].numpy(), quantized.values)
        loaded = QuantizedMatrix(quantized.with_parts(lambda part: to_tensor(part * 0)))
        product(rows, loaded)
        loaded.load_state_dict(w.state_dict())
        assert torch.equal(product(rows, loaded), y)
        half = w.bfloat16()
    assert half.dtype == torch.bfloat16
    np.testing.assert_array_equal(half.quantized.values.numpy(), quantized.values)
    assert w.nbytes == quantized.nbytes


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("scheme", ["q8", "q4"])
def test_forward_mode_takes_the_dequantised_slope(scheme: str) -> None:
    x, quantized = drawn((128, 64), scheme)
    w = QuantizedMatrix(quantized.with_parts(to_tensor))
    rows, change = torch.from_numpy(x), torch.from_numpy(x[::-1].copy())
    y, tangent = torch.func.jvp(lambda x: product(x, w), (rows,), (change,))  # pyright: ignore[reportAssignmentType]
    expected = change @ torch.from_numpy(dequantize(quantized))
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(y, product(rows, w))


def test_an_operator_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = kernels.extremes(3, 64)

    def exact() -> bool:
        return kernels._exact(x, x, lambda rows: kernels.plain_sums8(rows, x))

    assert kernels.works(exact)() == kernels.plain8_works()
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: x.new_zeros(len(x), w.shape[1]))
    assert not kernels.works(exact)()
    monkeypatch.delattr(torch, "_int_mm")
    assert not kernels.works(exact)()


def test_a_row_in_bfloat16_is_what_linear_gives() -> None:
    rng = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 512, generator=rng).bfloat16() for n in (96, 1))
    bias = torch.randn(96, generator=rng).bfloat16()
    for b in (None, bias):
        row = product(x[None], w, b, axis=-1)
        torch.testing.assert_close(row, torch.nn.functional.linear(x[None], w, b))
