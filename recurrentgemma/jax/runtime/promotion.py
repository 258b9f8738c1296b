"""JAX's default rules for ranks and dtypes, by which this package is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def default_promotion(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function under the default rules, where the user may have set strict ones.

    `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` are about the user's
    own code. A custom derivative's backward pass is traced on its own, and needs this, too.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run
