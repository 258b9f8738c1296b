"""How the linear recurrence is split over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AxisName = str | tuple[str, ...] | None


class ShardingSpec(NamedTuple):
    """Which mesh axes the scan's [B, T, D] arrays are split over.

    Batch and width split without communication. Where the sequence is split, each device scans its
    part twice: from zero, for the state that it adds and the decay that it applies, and then from
    the state that reaches it.

    Attributes:
      mesh: The devices.
      batch_axis_name: Mesh axis, or axes, of the batch.
      sequence_axis_name: Mesh axis of the sequence.
      activations_axis_name: Mesh axis, or axes, of the width.
    """

    mesh: Mesh
    batch_axis_name: AxisName = None
    sequence_axis_name: str | None = None
    activations_axis_name: AxisName = None

    @property
    def activations_sharding_spec(self) -> PartitionSpec:
        """The partition of [B, T, D] arrays."""
        return PartitionSpec(
            self.batch_axis_name, self.sequence_axis_name, self.activations_axis_name
        )

    @property
    def activations_sharding(self) -> NamedSharding:
        """The sharding of [B, T, D] arrays."""
        return NamedSharding(self.mesh, self.activations_sharding_spec)


Scan = Callable[[Array, Array, Array, bool], tuple[Array, Array]]


def sharded_scan(scan: Scan, spec: ShardingSpec) -> Scan:
    """`scan(x, a, h0, reverse)`, each device working on its part."""
    full = spec.activations_sharding_spec
    state = PartitionSpec(spec.batch_axis_name, spec.activations_axis_name)

    def run(x: Array, a: Array, h0: Array, reverse: bool) -> tuple[Array, Array]:
        def local(x: Array, a: Array, h0: Array) -> tuple[Array, Array]:
            axis = spec.sequence_axis_name
            if axis is None:
                return scan(x, a, h0, reverse)
            _, added = scan(x, a, jnp.zeros_like(h0), reverse)
            states = _states_between(added, a.prod(1), h0, axis, reverse)
            here = lax.axis_index(axis)
            y, _ = scan(x, a, lax.dynamic_index_in_dim(states, here, keepdims=False), reverse)
            return y, states[-1]

        return jax.shard_map(
            local,
            mesh=spec.mesh,
            in_specs=(full, full, state),
            out_specs=(full, state),
            check_vma=False,
        )(x, a, h0)

    return run


def _states_between(added: Array, decay: Array, h0: Array, axis: str, reverse: bool) -> Array:
    """The state that reaches each device, by its index on the axis, and after them the last."""
    added, decay = lax.all_gather(added, axis), lax.all_gather(decay, axis)
    order = range(added.shape[0])
    states, reaching = [], h0
    for i in reversed(order) if reverse else order:
        states.append(reaching)
        reaching = decay[i] * reaching + added[i]
    return jnp.stack([*(states[::-1] if reverse else states), reaching])
