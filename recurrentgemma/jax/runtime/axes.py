"""Meshes with explicit axes, whose names are part of an array's type (`jax.sharding.AxisType`).

There JAX refuses each operation whose result could be split in two ways. Inside this package the
axes are automatic: the compiler decides, as on a mesh with automatic axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from recurrentgemma.common.errors import UserError

_R = TypeVar("_R")


def automatic(
    function: Callable[..., _R], partitions: Callable[[_R], Any], *args: Any, **kwargs: Any
) -> _R:
    """`function(*args, **kwargs)` on automatic axes; its results are on explicit ones again.

    Args:
      function: A function of trees with arrays among their leaves.
      partitions: How the results are split over explicit axes, from the results to a tree of
        `PartitionSpec`; not asked where no axis is explicit.
      args: Its arguments.
      kwargs: Its arguments by name.
    """
    mesh = explicit_mesh((args, kwargs))
    if mesh is None:
        return function(*args, **kwargs)
    inside = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(inside):
        args, kwargs = jax.tree.map(lambda leaf: _entered(leaf, inside), (args, kwargs))
        results = function(*args, **kwargs)
    return jax.tree.map(
        lambda leaf, spec: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)),
        results,
        partitions(results),
    )


class AnyAxes(nn.Module):
    """A Linen module of tokens; its outputs are split over explicit axes as their rows are."""

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `apply`.

        Raises:
          ValueError: `variables` has no "params".
        """
        if "params" not in variables:
            raise UserError(f'variables must be {{"params": params}}, got {", ".join(variables)}')
        return _like_tokens(super().apply, variables, *args, **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `init_with_output`."""
        return _like_tokens(super().init_with_output, rngs, *args, **kwargs)


def _like_tokens(function: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of Linen on automatic axes, its results split as the tokens are."""
    tokens: Any = args[0] if args else kwargs.get("tokens")

    def split(result: Array) -> PartitionSpec:
        shape = np.shape(tokens)
        shared = 2 if result.ndim > 2 and result.shape[:2] == shape else 1
        if not shape or result.shape[:shared] != shape[:shared]:
            return PartitionSpec()
        return PartitionSpec(*partition(tokens)[:shared])

    return automatic(function, lambda results: jax.tree.map(split, results), first, *args, **kwargs)


def partition(array: Any) -> PartitionSpec:
    """How an array is split over explicit axes."""
    return jax.typeof(array).sharding.spec


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with explicit axes that is set, or that an array of a tree is on."""
    if jax.sharding.get_abstract_mesh().explicit_axes:
        return jax.sharding.get_abstract_mesh()
    return next(filter(None, map(_explicit_mesh, jax.tree.leaves(tree))), None)


def _explicit_mesh(leaf: Any) -> AbstractMesh | None:
    mesh = jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None
    return mesh if mesh is not None and mesh.explicit_axes else None


def _entered(leaf: Any, mesh: AbstractMesh) -> Any:
    """The leaf where the axes of the mesh are automatic; it stays split as it is."""
    if _explicit_mesh(leaf) is None:
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))
