"""Parameters in JAX: trees by path, initial values, and the dtypes that JAX has turned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.init import Init, Normal, RingLog, Zeros
from recurrentgemma.common.model.params import tree_keys
from recurrentgemma.jax.scan import wide_dtype

Params = Mapping[str, Any]


def require_available(dtype: Dtype | None) -> None:
    """Raises `ValueError` for a dtype in whose place JAX would take a narrower one."""
    if dtype is not None and (taken := jax.dtypes.canonicalize_dtype(dtype)) != jnp.dtype(dtype):
        raise UserError(
            f"dtype must be one that JAX has turned on, got {jnp.dtype(dtype)}, for which it would "
            f"take {taken}: jax.config.update('jax_enable_x64', True) turns it on"
        )


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Puts a leaf at a layer spec's path into a tree of Flax parameters."""
    *parents, leaf = tree_keys(path)
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def get_path(tree: Params, path: str) -> Any:
    """The leaf at a layer spec's path in a tree of Flax parameters."""
    for key in tree_keys(path):
        tree = tree[key]
    return tree


def initializer(init: Init):
    """A Flax initialiser that draws as the layer spec says, in float32 or wider, then casts."""

    def draw(key, shape, dtype=jnp.float32):
        wide = wide_dtype(dtype)
        match init:
            case Normal(std):
                values = std * jax.random.normal(key, shape, wide)
            case RingLog():
                values = init.from_uniform(jax.random.uniform(key, shape, wide), jnp)
            case Zeros():
                values = jnp.zeros(shape, wide)
        return values.astype(dtype)

    return draw
