"""How much is swept: little every time, and more with HYPOTHESIS_PROFILE=long."""

import os
from collections.abc import Iterable
from typing import TypeVar

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
T = TypeVar("T")


def sweep(short: T, long: T) -> T:
    """The first every time, the second in the long profile."""
    return long if LONG else short


def fewer_in_jax(values: Iterable[T], jax: Iterable[T]) -> list[tuple[str, T]]:
    """Pairs of a twin and a value: PyTorch compiles nothing and takes all.

    JAX takes some, and in the long profile all.
    """
    values = list(values)
    return [("jax", v) for v in sweep(list(jax), values)] + [("torch", v) for v in values]
