"""The table of embeddings where its rows, the vocabulary, lie on several devices.

Devices that share the tokens of a batch compute with their own slice of the table, and add up.
Devices with tokens of their own pass the slices around a ring: no device holds the whole table.
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
from recurrentgemma.jax.sharding import automatic_mesh, sizes_of, token_split


class TableSplit(NamedTuple):
    """How a table and the tokens of a batch are split.

    Attributes:
      mesh: The devices.
      batch: The mesh axes that split the rows.
      time: The mesh axes that split the tokens of a row.
      shared: The mesh axis that splits the vocabulary among devices with the same tokens, if any.
      ring: The mesh axis that splits the vocabulary among devices with tokens of their own, if any.
      width: The mesh axis that splits the width at rest among devices with tokens of their own.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    time: tuple[str, ...]
    shared: str | None
    ring: str | None
    width: str | None

    @property
    def table(self) -> PartitionSpec:
        """The partition of the table, [V, D]."""
        return PartitionSpec(self.shared or self.ring, self.width)

    @property
    def tokens(self) -> PartitionSpec:
        """The partition of arrays [B, T, ...]."""
        return PartitionSpec(self.batch, self.time)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that split the tokens."""
        return self.batch + self.time

    def gathered(self, table: Array) -> Array:
        """A device's slice of the vocabulary, in its whole width."""
        return lax.all_gather(table, self.width, axis=1, tiled=True) if self.width else table


def table_split(mesh: Mesh, table: tuple[int, ...], tokens: tuple[int, ...]) -> TableSplit:
    """How a table [V, D] and tokens [B, T] of these shapes are split."""
    (spec,) = params.embedder(table[0], table[1])
    vocab, width = split_of(spec, sizes_of(mesh))
    batch, time = token_split(mesh, tokens[0], tokens[1])
    return TableSplit(
        automatic_mesh(mesh),
        batch,
        time,
        shared=vocab if vocab not in batch + time else None,
        ring=vocab if vocab in batch + time else None,
        width=width if width in batch + time else None,
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
    split = table_split(mesh, table.shape, tokens.shape)

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
        local, mesh=split.mesh, in_specs=(split.table, split.tokens), out_specs=split.tokens
    )(table, tokens)
