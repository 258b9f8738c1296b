"""What XLA is told when it compiles."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# By default XLA's own loops, a token's products among them, use half of an AVX-512 register;
# elsewhere it changes nothing.
_OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


@functools.lru_cache
def compiler_options(platform: str) -> dict[str, Any] | None:
    """The options for a platform, if this version of XLA knows them."""
    options = _OPTIONS.get(platform)
    if options is None:
        return None
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def platform_of(arrays: Any) -> str:
    """Where the arrays of a tree are: "cpu", "gpu" or "tpu"."""
    leaf: Array = jax.tree.leaves(arrays)[0]
    return next(iter(leaf.sharding.device_set)).platform
