"""Processes that compute each layer together: each has its heads, channels and its vocabulary.

The residual stream is whole in all. A block shares it (`Team.shared`), each process computes its
part of the block, and outputs over the width are added up (`Team.total`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.mixers import CAPACITY_BLOCK, Attention, Recurrent
from recurrentgemma.common.model.params import StateSpec
from recurrentgemma.common.model.state import Arrays
from recurrentgemma.common.sharding import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXIS = "tensor"
TIME = "sequence"
SplitOf = Callable[[str], Split]  # from the name of a module's parameter to its split


class Team:
    """A process alone, which computes whole layers.

    Attributes:
      index: The number of this process in the team, from 0.
      count: How many there are.
    """

    index = 0
    count = 1

    def shared(self, x: Tensor) -> Tensor:
        """x, which all have and of which each computes a part: its gradients are added up."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' x; each passes the gradient on."""
        return x

    def joined(self, x: Tensor) -> Tensor:
        """All processes' x, side by side along the last axis."""
        return x

    def local(self, x: Any) -> Any:
        """This process's part of a parameter."""
        return x

    def looked_up(self, lookup: Callable[..., Tensor], table: Any, index: Tensor) -> Tensor:
        """`lookup(table, index)`, the rows of a table of which each process may have a part."""
        return lookup(self.local(table), index)

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        return [value]


class MeshTeam(Team):
    """The processes along the axis "tensor" of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group(AXIS)
        self.index, self.count = mesh.get_local_rank(AXIS), dist.get_world_size(self.group)

    def shared(self, x: Tensor) -> Tensor:
        return _Shared.apply(x, self.group)  # pyright: ignore[reportReturnType]

    def total(self, x: Tensor) -> Tensor:
        return _Total.apply(x, self.group)  # pyright: ignore[reportReturnType]

    def joined(self, x: Tensor) -> Tensor:
        return _Joined.apply(x, self)  # pyright: ignore[reportReturnType]

    def local(self, x: Any) -> Any:
        return x.to_local() if hasattr(x, "to_local") else x

    def looked_up(self, lookup: Callable[..., Tensor], table: Any, index: Tensor) -> Tensor:
        part = self.local(table)
        index = index - self.index * len(part)
        others = (index < 0) | (index >= len(part))
        rows = lookup(part, index.masked_fill(others, 0))
        return self.total(rows.masked_fill(others[..., None], 0))

    def everyone(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, self.group)
        return values


class TimeTeam(Team):
    """The processes along the axis "sequence" of a mesh: each computes whole layers on its tokens.

    At rest each has a part of every parameter; the whole is gathered where it is used.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group(TIME)

    def local(self, x: Any) -> Any:
        from torch.distributed.tensor import Partial, Replicate

        if not hasattr(x, "redistribute"):
            return x
        if x.placements[0].is_replicate():
            return _Shared.apply(x.to_local(), self.group)
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


ALONE = Team()


def inner_axis(sizes: Mapping[str, int]) -> str | None:
    """The axis along which parameters are split beside FSDP."""
    return next((axis for axis in (AXIS, TIME) if sizes.get(axis, 1) > 1), None)


def team_of(mesh: DeviceMesh | None, axis: str = AXIS) -> Team:
    """This process's team along an axis of a mesh."""
    if mesh is None or axis not in (mesh.mesh_dim_names or ()) or mesh[axis].size() == 1:
        return ALONE
    return MeshTeam(mesh) if axis == AXIS else TimeTeam(mesh)


def on_parts(team: Team, module: nn.Module, *args: Any) -> Any:
    """A module's result from a process's parts of its parameters."""
    tensors = {name: team.local(value) for name, value in module.named_parameters()}
    return functional_call(module, tensors, args)


def mixer_part(mixer: Any, team: Team) -> Any:
    """The mixer that a process of a team computes."""
    if isinstance(mixer, Recurrent):
        width, blocks = mixer.width // team.count, mixer.gate_blocks // team.count
        return dataclasses.replace(mixer, width=width, gate_blocks=blocks)
    if isinstance(mixer, Attention):
        heads, used = mixer.heads // team.count, key_heads(mixer, team.index, team.count)
        return dataclasses.replace(mixer, heads=heads, kv_heads=len(used))
    return mixer


def config_part(config: Config, team: Team) -> Config:
    """A model whose state is the part that a process of a team keeps."""
    if team.count == 1:
        return config
    model = config.model
    layers = (
        dataclasses.replace(layer, mixer=mixer_part(layer.mixer, team)) for layer in model.layers
    )
    return dataclasses.replace(model, layers=tuple(layers))


def key_heads(mixer: Attention, index: int, count: int) -> list[int]:
    """The key heads that a process's query heads use, each once or once for each query head."""
    heads, group = mixer.heads // count, mixer.heads // mixer.kv_heads
    used = [head // group for head in range(index * heads, (index + 1) * heads)]
    first = sorted(set(used))
    even = [head for head in first for _ in range(heads // len(first))]
    return first if even == used else used


def state_part(config: Config, arrays: Arrays, team: Team) -> Arrays:
    """The part of a model's state that a process of a team keeps."""

    def part(mixer: Any, spec: StateSpec, value: np.ndarray) -> np.ndarray:
        axis, held = _held(mixer, spec, team.count)
        return value if axis is None else value.take(held[team.index], axis)

    return _mapped(config, arrays, part)


def whole_state(config: Config, arrays: Arrays, team: Team) -> Arrays:
    """A model's state, from the part of each process of a team; all must call this together."""

    def whole(mixer: Any, spec: StateSpec, value: np.ndarray) -> np.ndarray:
        axis, held = _held(mixer, spec, team.count)
        if axis is None:
            return value
        shape = (*value.shape[:axis], spec.shape[axis - 1], *value.shape[axis + 1 :])
        result = np.zeros(shape, value.dtype)
        for index, part in zip(held, team.everyone(value), strict=True):
            result.swapaxes(0, axis)[index] = part.swapaxes(0, axis)
        return result

    return _mapped(config, arrays, whole)


def _mapped(config: Config, arrays: Arrays, change: Callable[..., np.ndarray]) -> Arrays:
    return {
        f"blocks.{i}": {
            spec.path: change(layer.mixer, spec, arrays[f"blocks.{i}"][spec.path])
            for spec in layer.mixer.state(CAPACITY_BLOCK)
        }
        for i, layer in enumerate(config.model.layers)
    }


def _held(mixer: Any, spec: StateSpec, count: int) -> tuple[int | None, list[list[int]]]:
    """The axis of a state's array, [B, ...], that a team splits, and what each process keeps."""
    for axis, (name, size) in enumerate(zip(spec.axes, spec.shape, strict=True), 1):
        if name == "lru":
            each = size // count
            return axis, [[*range(i * each, (i + 1) * each)] for i in range(count)]
        if name == "kv":
            return axis, [key_heads(mixer, i, count) for i in range(count)]
    return None, []


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _added(dx, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _added(x, group)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dx, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, team):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.team = team
        parts = [torch.empty_like(x) for _ in range(team.count)]
        dist.all_gather(parts, x.contiguous(), team.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dx.chunk(ctx.team.count, -1)[ctx.team.index], None


def _added(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
