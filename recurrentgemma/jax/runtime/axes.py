"""Meshes with explicit axes, whose names are part of an array's type (`jax.sharding.AxisType`).

There JAX refuses each operation whose result could be split in two ways. Inside this package the
axes are automatic: the compiler decides, as on a mesh with automatic axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

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
