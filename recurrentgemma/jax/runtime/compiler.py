"""Options for XLA's compiler."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# By default XLA's own loops, such as a single token's matrix products, use half of an AVX-512
# register. On other CPUs the option changes nothing.
_OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


@functools.lru_cache
def compiler_options(platform: str) -> dict[str, Any] | None:
    """The options for a platform; None if this version of XLA does not know them."""
    options = _OPTIONS.get(platform)
    if options is None:
        return None
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def platform_of(arrays: Any) -> str:
    """The platform that holds the arrays of a tree, or will: "cpu", "gpu" or "tpu"."""
    place: Any = getattr(jax.tree.leaves(arrays)[0], "sharding", None)
    return jax.default_backend() if place is None else next(iter(place.device_set)).platform
