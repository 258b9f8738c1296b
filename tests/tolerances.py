"""How close is close: one table, and the one function that reads it."""

from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """|actual - expected| <= absolute + relative * max|expected|, over a whole tensor.

    Relative to the tensor's scale and not to each element: sums that cancel lose the digits of
    their terms.
    """

    relative: float = 0.0
    absolute: float = 0.0


# float64: only the same arithmetic gets there. The absolute part stands for what is zero in exact
# arithmetic, such as the gradient of a softmax over one key.
# Slope: a gradient against a central difference of the reference, whose own error this is.
# float32: logits have a magnitude of 30 in these tests.
# bfloat16: 8 significant bits, so 2e-3 at each rounding, after a few layers.
# golden: float32 outputs of the published implementations, as the README beside them says; the
# logits of Gemma 2 are larger.
TOLERANCES = {
    ("float64", "logits"): Tolerance(relative=1e-10, absolute=1e-15),
    ("float64", "state"): Tolerance(relative=1e-10, absolute=1e-15),
    ("float64", "gradient"): Tolerance(relative=1e-10, absolute=1e-15),
    ("float64", "output"): Tolerance(relative=1e-10, absolute=1e-15),
    ("float64", "slope"): Tolerance(relative=1e-6, absolute=1e-9),
    ("float32", "logits"): Tolerance(absolute=5e-5),
    ("float32", "state"): Tolerance(absolute=2e-5),
    ("float32", "gradient"): Tolerance(relative=2e-5, absolute=2e-5),
    ("bfloat16", "logits"): Tolerance(relative=3e-2),
    ("bfloat16", "state"): Tolerance(relative=3e-2),
    ("bfloat16", "output"): Tolerance(relative=3e-2),
    ("bfloat16", "scan"): Tolerance(relative=2**-8),  # float32 inside, rounded once
    ("golden", "logits"): Tolerance(absolute=1e-4),
    ("golden", "state"): Tolerance(absolute=2e-5),
    ("golden", "gradient"): Tolerance(absolute=5e-5),
    ("golden Gemma", "logits"): Tolerance(absolute=5e-5),
    ("golden Gemma 2", "logits"): Tolerance(absolute=3e-4),
}


def assert_close(actual, expected, kind: str, dtype: str, *, name: str = "") -> None:
    """Asserts that arrays, or dicts of them at any depth, are alike and close.

    Integers must be equal. `kind` and `dtype` name an entry of `TOLERANCES`.
    """
    tolerance = TOLERANCES[dtype, kind]
    if isinstance(expected, dict):
        assert isinstance(actual, dict), f"{name}: expected a dict, got {type(actual).__name__}"
        assert list(actual) == list(expected), f"{name}: {list(actual)} is not {list(expected)}"
        for key in expected:
            assert_close(actual[key], expected[key], kind, dtype, name=f"{name}.{key}".strip("."))
        return
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    if expected.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, expected, err_msg=name)
        return
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(expected).all(), f"{name}: expected values are not finite"
    scale = np.abs(expected).max(initial=0)
    limit = tolerance.absolute + tolerance.relative * scale
    np.testing.assert_allclose(
        actual,
        expected,
        rtol=0,
        atol=limit,
        err_msg=f"{name}: {kind} in {dtype}, of magnitude {scale:.3g}",
    )


def assert_close_where_finite(actual, expected, kind: str, dtype: str, *, name: str = "") -> None:
    """As `assert_close`; what is expected not to be finite must not be."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(actual), finite, err_msg=name)
    assert_close(np.where(finite, actual, 0), np.where(finite, expected, 0), kind, dtype, name=name)
