"""How the linear recurrence is split over devices."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from recurrentgemma.jax.gates import Gates, Inputs, Scan
from recurrentgemma.jax.scan_xla import decays

AxisName = str | tuple[str, ...] | None


class ShardingSpec(NamedTuple):
    """Which mesh axes the scan's [B, T, D] arrays are split over.

    Batch and width split without communication; see `ShardedScan` for the sequence.

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


@dataclasses.dataclass(frozen=True)
class ShardedScan(Scan):
    """A scan of which each device does its part.

    Where the sequence is split, the parts are scanned twice: from zero, for the state that each
    adds to what reaches it, and then from the state that does.
    """

    local: Scan
    spec: ShardingSpec

    def forward(
        self, gates: Gates, inputs: Inputs, h0: Array, reverse: bool
    ) -> tuple[Array, Array]:
        axis = self.spec.sequence_axis_name

        def local(inputs: Inputs, h0: Array) -> tuple[Array, Array]:
            if axis is None:
                return self.local.forward(gates, inputs, h0, reverse)
            _, added = self.local.forward(gates, inputs, jnp.zeros_like(h0), reverse)
            decay = decays(gates, inputs).prod(1)
            reaching, last = _states_between(added, decay, h0, axis, reverse)
            y, _ = self.local.forward(gates, inputs, reaching, reverse)
            return y, last

        full, inputs_spec, state = self._specs(inputs)
        return self._map(local, (inputs_spec, state), (full, state))(inputs, h0)

    def backward(
        self,
        gates: Gates,
        inputs: Inputs,
        h0: Array,
        y: Array,
        dy: Array,
        dlast: Array,
        reverse: bool,
    ) -> tuple[Inputs, Array]:
        axis = self.spec.sequence_axis_name

        def local(
            inputs: Inputs, h0: Array, y: Array, dy: Array, dlast: Array
        ) -> tuple[Inputs, Array]:
            if axis is None:
                gradients, dh0 = self.local.backward(gates, inputs, h0, y, dy, dlast, reverse)
            else:
                before = _neighbour(y[:, 0 if reverse else -1].astype(h0.dtype), h0, axis, reverse)

                def run(dlast: Array) -> tuple[Inputs, Array]:
                    return self.local.backward(gates, inputs, before, y, dy, dlast, reverse)

                _, added = run(jnp.zeros_like(dlast))
                decay = decays(gates, inputs).prod(1)
                reaching, dh0 = _states_between(added, decay, dlast, axis, not reverse)
                gradients, _ = run(reaching)
            split = (self.spec.batch_axis_name, axis)
            axes = [
                name
                for names in split
                for name in (names if isinstance(names, tuple) else (names,))
                if name is not None
            ]
            channels = tuple(lax.psum(channel, axes) for channel in gradients.channels)
            return gradients._replace(channels=channels), dh0

        full, inputs_spec, state = self._specs(inputs)
        in_specs = (inputs_spec, state, full, full, state)
        out_specs = (inputs_spec._replace(position=None), state)
        return self._map(local, in_specs, out_specs)(inputs, h0, y, dy, dlast)

    def _map(self, function, in_specs, out_specs):
        return jax.shard_map(
            function,
            mesh=self.spec.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )

    def _specs(self, inputs: Inputs) -> tuple[PartitionSpec, Inputs, PartitionSpec]:
        """How sequences, inputs and states are split."""
        batch, sequence, width = full = self.spec.activations_sharding_spec
        specs = Inputs(
            full,
            (full,) * len(inputs.sequences),
            (PartitionSpec(width),) * len(inputs.channels),
            None if inputs.position is None else PartitionSpec(batch, sequence),
        )
        return full, specs, PartitionSpec(batch, width)


def _states_between(
    added: Array, decay: Array, h0: Array, axis: str, reverse: bool
) -> tuple[Array, Array]:
    """The state that reaches this device, and the one that leaves the last."""
    added, decay = lax.all_gather(added, axis), lax.all_gather(decay, axis)
    order = range(added.shape[0])
    states, state = [], h0
    for i in reversed(order) if reverse else order:
        states.append(state)
        state = decay[i] * state + added[i]
    states = jnp.stack(states[::-1] if reverse else states)
    return lax.dynamic_index_in_dim(states, lax.axis_index(axis), keepdims=False), state


def _neighbour(state: Array, first: Array, axis: str, reverse: bool) -> Array:
    """The state of the device before this one, `first` on the first."""
    here, devices = lax.axis_index(axis), lax.axis_size(axis)
    step = -1 if reverse else 1
    pairs = [(i, i + step) for i in range(devices) if 0 <= i + step < devices]
    state = lax.ppermute(state, axis, pairs)
    return jnp.where(here == (devices - 1 if reverse else 0), first, state)
