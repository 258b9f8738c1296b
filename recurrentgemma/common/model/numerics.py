"""The numbers of the numerics ledger (see `reference`), which both twins use."""

from __future__ import annotations

import math

RMS_EPS = 1e-6
RG_LRU_C = 8.0
MAX_SQRT_GRADIENT = 1000.0


def to_bfloat16(x: float) -> float:
    """The nearest number of 8 significant bits, ties to even."""
    fraction, exponent = math.frexp(x)  # x = fraction * 2**exponent, 1/2 <= fraction < 1
    return math.ldexp(round(fraction * 2**8), exponent - 8)
