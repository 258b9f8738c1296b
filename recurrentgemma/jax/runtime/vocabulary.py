"""The table of embeddings where its rows, the vocabulary, lie on several devices.

Devices that share the rows of a batch compute with their own slice of the table, and add up.
Devices with rows of their own pass the slices around a ring: no device holds the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from recurrentgemma.common.model import params
from recurrentgemma.common.sharding import split_of
from recurrentgemma.jax.sharding import automatic_mesh, batch_axes, sizes_of


class TableSplit(NamedTuple):
    """How a table and the rows of a batch are split.

    Attributes:
      mesh: The devices.
      batch: The mesh axes that split the rows.
      shared: The mesh axis that splits the vocabulary among devices with the same rows, if any.
      ring: The mesh axis that splits the vocabulary among devices with rows of their own, if any.
      width: The mesh axis that splits the width at rest among devices with rows of their own.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    shared: str | None
    ring: str | None
    width: str | None

    @property
    def table(self) -> PartitionSpec:
        """The partition of the table, [V, D]."""
        return PartitionSpec(self.shared or self.ring, self.width)

    @property
    def rows(self) -> PartitionSpec:
        """The partition of arrays [B, ...]."""
        return PartitionSpec(self.batch)

    def gathered(self, table: Array) -> Array:
        """A device's slice of the vocabulary, in its whole width."""
        return lax.all_gather(table, self.width, axis=1, tiled=True) if self.width else table


def table_split(mesh: Mesh, vocab_size: int, width: int, rows: int) -> TableSplit:
    """How a table [V, D] and so many rows are split."""
    (spec,) = params.embedder(vocab_size, width)
    vocab, split_width = split_of(spec, sizes_of(mesh))
    batch = batch_axes(mesh, rows)
    return TableSplit(
        automatic_mesh(mesh),
        batch,
        shared=vocab if vocab not in batch else None,
        ring=vocab if vocab in batch else None,
        width=split_width if split_width in batch else None,
    )


def around(axis: str, table: Array, body: Callable[[Any, Array, Array], Any], carry: Any) -> Any:
    """`carry = body(carry, slice, first)` for each slice of a table, this device's own first.

    Args:
      axis: The mesh axis of the ring.
      table: This device's slice.
      body: Takes a slice and the number of its first row.
      carry: What the first call takes.
    """
    devices, here = lax.axis_size(axis), lax.axis_index(axis)

    def step(state: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], None]:
        carry, table = state
        table = passed(table, axis)
        return (body(carry, table, (here + i) % devices * len(table)), table), None

    carry = body(carry, table, here * len(table))
    (carry, _), _ = lax.scan(step, (carry, table), jnp.arange(1, devices))
    return carry


def passed(x: Array, axis: str) -> Array:
    """The array of the next device in a ring."""
    devices = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i - 1) % devices) for i in range(devices)])


def lookup(table: Array, tokens: Array, mesh: Mesh) -> Array:
    """The rows of a table [V, D] at tokens [B, T], which are [B, T, D]."""
    split = table_split(mesh, table.shape[0], table.shape[1], tokens.shape[0])

    def found(table: Array, tokens: Array, first: Array) -> Array:
        local = tokens - first
        inside = (local >= 0) & (local < len(table))
        return jnp.where(inside[..., None], table[jnp.where(inside, local, 0)], 0)

    def local(table: Array, tokens: Array) -> Array:
        table = split.gathered(table)
        if split.ring:
            return around(
                split.ring, table, lambda x, *part: x + found(part[0], tokens, part[1]), 0
            )
        if split.shared:
            first = lax.axis_index(split.shared) * len(table)
            return lax.psum(found(table, tokens, first), split.shared)
        return table[tokens]

    return jax.shard_map(
        local, mesh=split.mesh, in_specs=(split.table, split.rows), out_specs=split.rows
    )(table, tokens)
