"""The distributions of initial parameter values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Normal(NamedTuple):
    """Independent normal values of mean 0 and standard deviation `std`."""

    std: float

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(self.std)


class Zeros(NamedTuple):
    """Zeros."""

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        del rng
        return np.zeros(shape, np.float32)


class RingLog(NamedTuple):
    """The RG-LRU's `a_param`: exp(-softplus(a_param)) uniform on a ring of the unit disk.

    The squared radius is uniform in [min_radius^2, max_radius^2] (arXiv 2402.19427, section 2.4).
    """

    min_radius: float
    max_radius: float

    def from_uniform(self, u, xp=np):
        """The parameter at uniform values `u` in [0, 1), in the array namespace `xp`."""
        low, high = self.min_radius**2, self.max_radius**2
        return xp.log(xp.expm1(-0.5 * xp.log(low + u * (high - low))))

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return self.from_uniform(rng.random(shape, np.float32)).astype(np.float32)


Init = Normal | Zeros | RingLog
