"""Arrays in pieces: they have the values of the whole array, whatever its strides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recurrentgemma.common.io.arrays import (
    BFLOAT16,
    DTYPES,
    Stacked,
    count_nonfinite,
    pieces,
    same_bits,
)

SHAPES = ((0,), (5,), (3, 200), (300, 70), (2, 130, 65), (2, 1, 1, 7))
SPECIAL = (np.nan, np.inf, -np.inf, -0.0, 3e38, 1e-40)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any shape, order of axes and dtype, with values that a cast changes."""
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.normal(size=shape)
    for special in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
        if values.size:
            values.flat[rng.integers(values.size)] = special
    order = draw(st.permutations(range(len(shape))))
    with np.errstate(over="ignore"):
        dtype = DTYPES[draw(st.sampled_from(["bfloat16", "float32", "float64"]))]
        lying = np.ascontiguousarray(values.transpose(order)).astype(dtype)
    return lying.transpose(np.argsort(order))


def parted(array: np.ndarray) -> list[np.ndarray | Stacked]:
    """The array and, if it has rows, its rows as `Stacked`."""
    return [array, Stacked(list(array))] if array.ndim > 1 else [array]


@given(arrays(), st.sampled_from([None, "bfloat16", "float32"]))
def test_pieces_are_the_values_in_order(array: np.ndarray, name: str | None) -> None:
    dtype = array.dtype if name is None else DTYPES[name]
    # ml_dtypes rounds this cast twice; test_loading.py covers it.
    assume((array.dtype, dtype) != (np.float64, BFLOAT16))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = array.astype(dtype)
    for form in parted(array):
        parts = list(pieces(form, None if name is None else dtype))
        assert all(part.ndim == 1 and part.flags.c_contiguous for part in parts)
        joined = np.concatenate([np.zeros(0, dtype), *parts])
        assert joined.tobytes() == expected.tobytes()
        finite = np.isfinite(expected.astype(np.float32)) if name else np.isfinite(
            expected.astype(np.float64))  # fmt: skip
        assert count_nonfinite(form, dtype) == array.size - np.count_nonzero(finite)
        assert same_bits(form, expected, dtype)


@given(arrays(), st.data())
def test_one_bit_is_seen(array: np.ndarray, data: st.DataObject) -> None:
    assume(array.size)
    other = array.copy()
    at = data.draw(st.integers(0, array.size - 1))
    bits = np.ascontiguousarray(other).view(f"u{array.itemsize}").reshape(-1)
    bits[at] ^= 1
    changed = bits.view(array.dtype).reshape(array.shape)
    for one in parted(array):
        for two in parted(changed):
            assert not same_bits(one, two)
        for two in parted(array.copy()):
            assert same_bits(one, two)


@given(arrays().filter(lambda array: array.ndim > 1))
def test_stacked_rows_are_an_array(array: np.ndarray) -> None:
    stacked = Stacked(list(array))
    whole = np.asarray(stacked)
    assert (stacked.shape, stacked.dtype, len(stacked)) == (array.shape, array.dtype, len(array))
    assert whole.tobytes() == array.tobytes()
    assert stacked[1].tobytes() == array[1].tobytes()
    assert stacked[1:].tobytes() == array[1:].tobytes()
    assert np.asarray(stacked.reshape((-1,))).tobytes() == array.tobytes()
    assert stacked.reshape(array.shape) is stacked


def test_stacked_rows_keep_their_strides() -> None:
    rows = [np.ones((3, 5)).T, np.zeros((3, 5)).T]
    whole = np.asarray(Stacked(rows))
    assert [row.strides for row in whole] == [row.strides for row in rows]  # nothing was transposed


def test_rows_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        np.asarray(Stacked([np.zeros(2), np.zeros(3)]))
