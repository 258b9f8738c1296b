"""Options for XLA's compiler."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# By default XLA's own loops, such as a single token's matrix products, use half of an AVX-512
# register. On other CPUs the option changes nothing.
_OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}
# By default XLA copies an argument that is read and then changed in its place, even if all reads
# come first.
_IN_PLACE = {"cpu": {"xla_cpu_copy_insertion_use_region_analysis": True}}


def compiler_options(platform: str, in_place: bool = False) -> dict[str, Any] | None:
    """The options for a platform that this version of XLA knows; None if there are none.

    Args:
      platform: "cpu", "gpu" or "tpu".
      in_place: Whether the program changes large arguments in their place.
    """
    options = _OPTIONS.get(platform, {}) | (_IN_PLACE.get(platform, {}) if in_place else {})
    return {name: options[name] for name in options if _is_known(name, options[name])} or None


@functools.lru_cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def platform_of(arrays: Any) -> str:
    """The platform that holds the arrays of a tree, or will: "cpu", "gpu" or "tpu"."""
    place: Any = getattr(jax.tree.leaves(arrays)[0], "sharding", None)
    return jax.default_backend() if place is None else next(iter(place.device_set)).platform
