"""The schemes of quantised weights, as NumPy defines them."""

import numpy as np
import pytest
from cases import make_config

from recurrentgemma.common import quantization
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import (
    SCHEMES,
    Quantized,
    dequantize,
    pack,
    part_shapes,
    product,
    quantize,
    quantize_rows,
    scheme_for,
    scheme_of,
    unpack,
)

SHAPES = [(64, 5), (2, 96, 6), (12, 4)]


def random(shape: tuple[int, ...]) -> np.ndarray:
    """Normal values; the outputs of number 2 are zeros."""
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kernel[..., 2] = 0
    return kernel


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits(shape: tuple[int, ...]) -> None:
    """The error is at most half a step, 1/254 of a column's largest value; zeros stay zeros."""
    kernel = random(shape)
    held = quantize(kernel)
    assert held.values.dtype == np.int8
    assert held.zero is None
    assert held.values.shape == (*shape[:-2], shape[-1], shape[-2])
    assert np.abs(held.values).max((-2, -1)).tolist() == np.full(shape[:-2], 127).tolist()
    largest = np.abs(kernel).max(-2, keepdims=True)
    np.testing.assert_allclose(held.scale.swapaxes(-1, -2), largest / 127, rtol=1e-6)
    given = dequantize(held)
    assert (np.abs(given - kernel) <= largest / 254 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(given[..., 2], 0)


@pytest.mark.parametrize("scheme", ["q4", "q4_32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits(scheme: str, shape: tuple[int, ...]) -> None:
    """The error is at most a step of its group: half of one, and half of the zero's rounding."""
    kernel = random(shape)
    held = quantize(kernel, scheme)
    group = min(SCHEMES[scheme].group or 0, shape[-2])
    assert held.scale.shape[-1] == shape[-2] // group
    assert held.zero.min() >= 0
    assert held.zero.max() <= 15
    steps = np.repeat(held.scale, group, -1).swapaxes(-1, -2)
    given = dequantize(held)
    assert (np.abs(given - kernel) <= steps * (1 + 1e-5)).all()
    assert np.abs(given - kernel).mean() < 0.3 * steps.mean()
    np.testing.assert_array_equal(given[..., 2], 0)
    np.testing.assert_array_equal(unpack(pack(unpack(held.values))), unpack(held.values))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layout_of_the_matrix_and_strips_do_not_matter(scheme: str, monkeypatch) -> None:
    kernel = random((2, 64, 6))
    expected = quantize(kernel, scheme)
    monkeypatch.setattr(quantization, "_STRIP", 1)
    turned = quantize(np.ascontiguousarray(kernel.swapaxes(1, 2)), scheme, axis=-1)
    for part, array in expected.parts.items():
        np.testing.assert_array_equal(array, turned.parts[part])
    assert (expected.shape, turned.shape) == ((2, 64, 6), (2, 6, 64))
    np.testing.assert_array_equal(dequantize(expected), dequantize(turned).swapaxes(1, 2))
    declared = part_shapes((2, 64, 6), scheme)
    assert {n: (a.shape, a.dtype) for n, a in expected.parts.items()} == declared
    assert quantization.quantized_bytes((2, 64, 6), scheme) == expected.nbytes


def test_products() -> None:
    """The integer form is near the product, and exactly its definition where nothing is rounded."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 64)).astype(np.float32), random((64, 5))
    held = quantize(w)
    expected = x @ dequantize(held)
    np.testing.assert_array_equal(product(x, held.replace(integer=False)), expected)
    assert np.abs(product(x, held) - expected).max() < 0.1
    whole = rng.integers(-127, 128, (3, 64)).astype(np.float32)
    whole[:, 0] = 127  # each row's scale is then 1
    np.testing.assert_allclose(product(whole, held), whole @ dequantize(held), rtol=1e-4, atol=1e-4)
    rows, scale = quantize_rows(np.zeros((2, 8), np.float32))
    assert not rows.any()
    assert not scale.any()


def test_which_parameters_are_quantised() -> None:
    """The matrices and the embedding, which is q8 in every scheme; no norm, bias or convolution."""
    found = {s.path: scheme_for(s, "q4") for s in layer_spec(make_config("RA"))}
    names = {path.rpartition(".")[2] for path, scheme in found.items() if scheme}
    assert names == {"input_embedding", "kernel", "w"}
    assert found["embedder.input_embedding"] == "q8"
    assert found["blocks.0.recurrent_block.conv_1d.w"] is None
    assert found["blocks.0.recurrent_block.rg_lru.a_gate.w"] == "q4"


def test_what_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"q4 needs inputs that groups of 128 divide, got a of .*192"
    ):
        quantize(np.zeros((192, 4), np.float32), "q4", name="a")
    with pytest.raises(ValueError, match=r"q4_32 needs inputs that pairs divide, .* 7 inputs"):
        quantize(np.zeros((7, 4), np.float32), "q4_32")
    with pytest.raises(ValueError, match="quantize must be one of q8, q4, q4_32, got 'q5'"):
        quantize(np.zeros((8, 4), np.float32), "q5")
    parts = np.zeros(1), np.zeros(1), None
    with pytest.raises(ValueError, match="in one scheme, got q4, q4_32"):
        scheme_of([Quantized(*parts, "q4"), Quantized(*parts, "q4_32"), Quantized(*parts, "q8")])
