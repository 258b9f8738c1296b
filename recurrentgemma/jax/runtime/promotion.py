"""This package relies on JAX's default rules for ranks and dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def default_promotion(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a function under the default rules, even if the user has set strict ones.

    `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` are meant for the
    user's own code. JAX traces the backward pass of a custom derivative on its own: decorate it,
    too.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run
