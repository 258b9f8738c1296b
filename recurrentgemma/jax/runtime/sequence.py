"""Rows whose tokens are split over devices: what a device needs from those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from recurrentgemma.jax.sharding import automatic_mesh, token_split

_R = TypeVar("_R")


def by_parts(function: Callable[..., _R], mesh: Mesh | None, *arrays: Array) -> _R:
    """`function(axis, *arrays)` of arrays [B, T, ...], on each device's part of the tokens.

    Args:
      function: Its first argument is the mesh axis that splits the tokens of a row, None where it
        gets whole rows; its results are arrays [B, T, ...].
      mesh: The devices, if there are several.
      arrays: Arrays that begin with rows and tokens.
    """
    batch, time = token_split(mesh, *arrays[0].shape[:2])
    if mesh is None or not time:
        return function(None, *arrays)
    (axis,), split = time, PartitionSpec(batch, time)

    def local(*parts: Array) -> Any:
        return function(axis, *parts)

    return jax.shard_map(
        local, mesh=automatic_mesh(mesh), in_specs=split, out_specs=split, check_vma=False
    )(*arrays)


def preceded(x: Array, reach: int | None, axis: str | None) -> Array:
    """A device's tokens, [B, T, ...], behind the `reach` tokens before them, all if None.

    Each device passes on what the one before it sends, so that only neighbours talk. Zeros stand
    before the first device.
    """
    if axis is None:
        return x
    length, others = x.shape[1], lax.axis_size(axis) - 1
    missing = others * length if reach is None else min(reach, others * length)
    pairs, parts = [(i, i + 1) for i in range(others)], [x]
    while missing:
        sent = parts[0][:, max(0, length - missing) :]
        parts.insert(0, lax.ppermute(sent, axis, pairs))
        missing -= sent.shape[1]
    return jnp.concatenate(parts, 1)


def lagged(x: Array, reach: int, mesh: Mesh | None) -> list[Array]:
    """x, [B, T, L], as it was 1 to `reach` tokens before each token; zeros before the first."""

    def parts(axis: str | None, x: Array) -> list[Array]:
        before = preceded(x, reach, axis)
        spare = reach + x.shape[1] - before.shape[1]
        return slices(jnp.pad(before, ((0, 0), (spare, 0), (0, 0))), reach)

    return by_parts(parts, mesh, x)


def slices(extended: Array, reach: int) -> list[Array]:
    """`lagged` of x behind the `reach` tokens before it, [B, reach + T, L]."""
    return [extended[:, reach - k : extended.shape[1] - k] for k in range(1, reach + 1)]
