"""How the linear recurrence is split over devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from recurrentgemma.common.errors import UserError
from recurrentgemma.jax.scan.gates import Gates, Inputs, Scan, decayed
from recurrentgemma.jax.scan.xla import decays
from recurrentgemma.jax.sharding import AxisName, ShardingSpec, automatic_mesh


def split(
    run: Callable[[Scan, Inputs, Array], tuple[Array, Array]],
    scan: Scan,
    spec: ShardingSpec,
    inputs: Inputs,
    h0: Array,
) -> tuple[Array, Array]:
    """Runs each device's part of `run(scan, inputs, h0)`.

    Raises:
      ValueError: The spec splits the sequence, but has no mesh.
    """
    batch, length, width = inputs.x.shape
    if length == 1:
        spec = spec._replace(sequence_axis_name=None)
    mesh = spec.mesh
    if mesh is None:
        if spec.sequence_axis_name is not None:
            raise UserError(
                f"ShardingSpec must have a mesh to split a sequence of {length} steps over, got "
                f"mesh=None and sequence_axis_name={spec.sequence_axis_name!r}"
            )
        return run(scan, inputs, h0)
    # Inside, types do not say how arrays are sharded.
    sharded = ShardedScan(scan, spec._replace(mesh=automatic_mesh(mesh)))

    y, last = run(sharded, *_padded(inputs, h0, sharded.spec))
    return y[:batch, :length, :width], last[:batch, :width]


def _padded(inputs: Inputs, h0: Array, spec: ShardingSpec) -> tuple[Inputs, Array]:
    """Pads rows, steps and channels until the mesh divides them."""
    assert spec.mesh is not None
    spare = []
    for size, names in zip(inputs.x.shape, spec.activations_sharding_spec, strict=True):
        spare.append((0, -size % math.prod(spec.mesh.shape[name] for name in _axes(names))))
    if not any(after for _, after in spare):
        return inputs, h0
    rows, steps, channels = spare
    x, sequences = jax.tree.map(lambda z: jnp.pad(z, spare), inputs[:2])
    position = inputs.position
    if position is None:
        position = jnp.ones(inputs.x.shape[:2], jnp.int32)
    position = jnp.pad(position, (rows, steps), constant_values=-1)
    padded_channels = tuple(jnp.pad(channel, channels) for channel in inputs.channels)
    return Inputs(x, sequences, padded_channels, position), jnp.pad(h0, (rows, channels))


def _axes(names: AxisName) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    if names is None:
        return ()
    return names if isinstance(names, tuple) else (names,)


@dataclasses.dataclass(frozen=True)
class ShardedScan(Scan):
    """A scan in which each device runs its part.

    If the sequence is split, each part runs twice: first from a zero state, to find what it adds to
    the state that reaches it, then from that state.
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
            axes = _axes(self.spec.batch_axis_name) + _axes(axis)
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
        state = self.spec.rnn_state_sharding_spec
        specs = Inputs(
            full,
            (full,) * len(inputs.sequences),
            (PartitionSpec(width),) * len(inputs.channels),
            None if inputs.position is None else PartitionSpec(batch, sequence),
        )
        return full, specs, state


def _states_between(
    added: Array, decay: Array, h0: Array, axis: str, reverse: bool
) -> tuple[Array, Array]:
    """The state that reaches this device, and the state that leaves the last device.

    Each device passes on what its part and those before it do to a state, twice as far each time.
    """
    devices, hops = lax.axis_size(axis), 1
    while hops < devices:
        earlier = _neighbour(added, jnp.zeros_like(added), axis, reverse, hops)
        before = _neighbour(decay, jnp.ones_like(decay), axis, reverse, hops)
        added, decay = decayed(decay, earlier) + added, before * decay
        hops *= 2
    leaving = decayed(decay, h0) + added
    is_last = lax.axis_index(axis) == (0 if reverse else devices - 1)
    last = lax.psum(jnp.where(is_last, leaving, 0), axis)
    return _neighbour(leaving, h0, axis, reverse), last


def _neighbour(state: Array, first: Array, axis: str, reverse: bool, hops: int = 1) -> Array:
    """The state of the device `hops` places before this one; `first` where no device is."""
    here, devices = lax.axis_index(axis), lax.axis_size(axis)
    step = -hops if reverse else hops
    pairs = [(i, i + step) for i in range(devices) if 0 <= i + step < devices]
    state = lax.ppermute(state, axis, pairs)
    return jnp.where((here - step >= 0) & (here - step < devices), state, first)
