"""A model split over the processes of a mesh, with DTensor and FSDP."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.state_dict import flax_path, torch_shape
from recurrentgemma.common.sharding import (
    AXES,
    BATCH_AXES,
    Split,
    each_split,
    mesh_text,
    parse_mesh,
    require_fit,
    strategy,
)
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime.processes import join, names_of
from recurrentgemma.torch.runtime.teams import AXIS, inner_axis, team_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from recurrentgemma.common.model.config import Config
    from recurrentgemma.torch.model import Model

_NEEDED = "2.10"  # before it, a part keeps the memory of the whole, or FSDP fails on a CPU
_BALANCE = 1.02  # of the ideal: how much the largest part may hold


def sizes_of(mesh: DeviceMesh) -> dict[str, int]:
    """The size of each axis of a mesh; the axis of a mesh without names is "fsdp".

    Raises:
      ValueError: The mesh is not one of the strategies of `common.sharding`.
    """
    if mesh.mesh_dim_names is None and mesh.ndim > 1:
        raise UserError("a mesh of several axes must name them: pass mesh_dim_names, or make_mesh")
    sizes = dict(zip(names_of(mesh), mesh.shape, strict=True))
    strategy(sizes)
    return sizes


def make_mesh(mesh: str | Mapping[str, int] = "fsdp=-1") -> DeviceMesh:
    """The mesh that a text such as "fsdp=4" names, over all processes of this run.

    They are those that `torchrun` or `srun` started; a process alone is a mesh of one.

    Args:
      mesh: The text, or the sizes by axis; see `common.sharding`.

    Raises:
      ValueError: The text is wrong, the mesh does not take all processes, they do not meet, or the
        strategy is unknown.
    """
    from torch.distributed.device_mesh import init_device_mesh

    join()
    count = dist.get_world_size()
    sizes = parse_mesh(mesh if isinstance(mesh, str) else mesh_text(mesh), count)
    strategy(sizes)
    if math.prod(sizes.values()) != count:
        raise UserError(f"a mesh must take all {count} processes, got {mesh_text(sizes)}")
    kept = {axis for axis, size in sizes.items() if size > 1}
    kept |= set() if inner_axis(sizes) else {"fsdp"}  # which FSDP splits over, be it 1
    sizes = {axis: sizes.get(axis, 1) for axis in AXES if axis in kept}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shard(model: Model, mesh: DeviceMesh, lora: LoraOptions | None = None) -> None:
    """Splits a model block by block as `common.sharding.layout` says, also on the meta device.

    What "fsdp" does not divide is split by rows, unevenly.

    Args:
      model: The model, perhaps with adapters.
      mesh: The processes.
      lora: The adapters, if it has any.

    Raises:
      ValueError: The mesh does not fit the model, or its strategy is unknown.
      RuntimeError: This version of PyTorch cannot split a model.
    """
    if TorchVersion(torch.__version__) < _NEEDED:
        raise RuntimeError(
            f"a model is split with PyTorch {_NEEDED} or newer, got {torch.__version__}"
        )
    sizes, splits = sizes_of(mesh), splits_of(model.config, mesh, lora)
    if "data" in sizes and "fsdp" not in sizes:
        raise UserError("a mesh with data needs an axis fsdp, be it of size 1; make_mesh adds it")
    require_fit(model.config, {AXIS: sizes.get(AXIS, 1)})
    for module in model.modules():  # parameters alone are split
        if isinstance(module, QuantizedMatrix):
            module.packs = False  # into the layout of a kernel, which is not split
        for name, buffer in list(module.named_buffers(recurse=False)):
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    model.mesh = mesh
    places = _places(model, splits, sizes)
    _require_balance(model, places, sizes)
    if inner_axis(sizes):
        _split_along(model, mesh, places, splits)
    if "fsdp" in sizes:
        _fully_shard(model, mesh, places)


class _Place(NamedTuple):
    """The axis of a tensor that "tensor" or "sequence" splits, if any; and the axis for FSDP."""

    inner: int | None
    fsdp: int


def _places(
    model: Model, splits: Mapping[str, Split], sizes: Mapping[str, int]
) -> dict[str, _Place]:
    """The axes of each parameter that are split, by name."""
    places: dict[str, _Place] = {}
    for name, path, parameter, by_rows in owners(model):
        split = splits[path]
        split = (*split[:-2], *split[:-3:-1]) if by_rows else torch_shape(path, split)
        axes: dict[str, int] = {}
        for i, (axis, size) in enumerate(zip(split, parameter.shape, strict=True)):
            if axis is None or size == 1:  # where the scale of a quantised matrix is reduced
                continue
            if size % sizes[axis] == 0:
                axes[axis] = i
            elif axis == AXIS:
                raise UserError(
                    f"tensor={sizes[axis]} must divide the groups of {name}, got {size}"
                )
        inner = axes.get(inner_axis(sizes) or "")
        fsdp = axes.get("fsdp")
        if fsdp is None:  # FSDP splits every tensor, and evenly along axes behind the first
            fsdp = 0
            if inner is not None and parameter.shape[inner] % math.prod(sizes.values()) == 0:
                fsdp = inner
        places[name] = _Place(inner, fsdp)
    return places


def _require_balance(model: Model, places: Mapping[str, _Place], sizes: Mapping[str, int]) -> None:
    """Raises `ValueError` where the largest part is too large and the layout says so, too."""
    fsdp, inner = sizes.get("fsdp", 1), sizes.get(inner_axis(sizes) or "", 1)
    total, kept = 0, 0
    for name, parameter in model.named_parameters():
        place = places[name]
        parts = 1 if place.inner is None else inner
        length = parameter.shape[place.fsdp] // (parts if place.fsdp == place.inner else 1)
        total += parameter.nbytes
        kept += parameter.nbytes // parts // length * -(-length // fsdp)
    if kept * fsdp * inner > _BALANCE * total:
        require_fit(model.config, sizes)


def _split_along(
    model: Model, mesh: DeviceMesh, places: Mapping[str, _Place], splits: Mapping[str, Split]
) -> None:
    """Splits the parameters along "tensor" or "sequence", and has each module compute its part."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    inner = str(inner_axis(sizes_of(mesh)))
    for name, parameter in list(model.named_parameters()):
        axis = places[name].inner
        how = [Replicate() if axis is None else Shard(axis)]
        part = distribute_tensor(parameter.detach(), mesh[inner], how, src_data_rank=None)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(part, parameter.requires_grad))
    team: Any = team_of(mesh, inner)
    for name, module in model.named_modules():
        join_team: Any = getattr(module, "_join", None)
        if join_team is not None:
            join_team(team, functools.partial(_split_in, splits, name, module))


def _split_in(splits: Mapping[str, Split], name: str, module: Any, leaf: str) -> Split:
    """How a parameter of a module is split."""
    return splits[_path_in(name, module, leaf)]


def _fully_shard(model: Model, mesh: DeviceMesh, places: Mapping[str, _Place]) -> None:
    """Splits the parameters along "fsdp", block by block."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    outer = tuple(name for name in names_of(mesh) if name in BATCH_AXES)
    mesh = mesh[outer] if len(outer) < mesh.ndim else mesh
    axes = {id(p): places[name].fsdp for name, p in model.named_parameters()}

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(axes[id(parameter)])

    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    register_fsdp_forward_method(model, "hidden")


def reshard(model: Model) -> None:
    """Gives up what FSDP has gathered for a forward pass that no backward pass follows."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.reshard()


def splits_of(
    config: Config, mesh: DeviceMesh | None, lora: LoraOptions | None = None
) -> dict[str, Split]:
    """How each parameter and adapter is to be split, by path; see `common.sharding.layout`.

    Parts may be uneven here, so that a mesh fits which would not fit there.
    """
    return each_split(config, {} if mesh is None else sizes_of(mesh), lora)


def owners(model: Model) -> Iterator[tuple[str, str, Tensor, bool]]:
    """Name, path in the layout, tensor and form of each parameter and buffer of a model.

    The model may have adapters: a module around another, its `base`, says by `owner` whose layout
    its own tensors have. The form is whether a tensor is a part of a `QuantizedMatrix`, which has
    rows of outputs.
    """
    for name, module in model.named_modules():
        by_rows = isinstance(module, QuantizedMatrix)
        own = module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        for leaf, parameter in itertools.chain(*own):
            full = f"{name}.{leaf}" if name else leaf
            yield full, _path_in(name, module, leaf), parameter, by_rows


def _path_in(name: str, module: nn.Module, leaf: str) -> str:
    """The path in the layout of a parameter, from its module and its name there."""
    place = [part for part in name.split(".") if part != "base"]
    if isinstance(module, QuantizedMatrix):
        return flax_path(".".join(place))
    owner: Any = getattr(module, "owner", flax_path)
    return ".".join([*place, owner(leaf)])
