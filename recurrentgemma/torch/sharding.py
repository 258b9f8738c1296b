"""A model split over the processes of a mesh, with FSDP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import flax_path, torch_shape
from recurrentgemma.common.sharding import (
    AXES,
    Split,
    mesh_text,
    parse_mesh,
    require_fit,
    split_of,
    strategy,
)
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime.processes import join

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    from recurrentgemma.common.model.config import Config
    from recurrentgemma.torch.model import Model

_NEEDED = "2.10"  # before it, a part keeps the memory of the whole, or FSDP fails on a CPU
_BALANCE = 1.02  # of the ideal: how much the largest part may hold
STRATEGIES = ("data", "fsdp")  # those of `common.sharding` that this twin computes


def sizes_of(mesh: DeviceMesh) -> dict[str, int]:
    """The size of each axis of a mesh; the axis of a mesh without names is "fsdp".

    Raises:
      ValueError: It is no mesh of `STRATEGIES`.
    """
    if mesh.mesh_dim_names is None and mesh.ndim > 1:
        raise UserError("a mesh of several axes must name them: pass mesh_dim_names, or make_mesh")
    return _offered(dict(zip(mesh.mesh_dim_names or ("fsdp",), mesh.shape, strict=True)))


def _offered(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes themselves, or `ValueError` for another strategy than `STRATEGIES`."""
    if (found := strategy(sizes)) not in STRATEGIES:
        raise UserError(
            f"in PyTorch a mesh is one of {', '.join(STRATEGIES)}, got {mesh_text(sizes)}: {found}"
        )
    return sizes


def make_mesh(mesh: str | Mapping[str, int] = "fsdp=-1") -> DeviceMesh:
    """The mesh that a text such as "fsdp=4" names, over all processes of this run.

    They are those that `torchrun` or `srun` started; a process alone is a mesh of one.

    Args:
      mesh: The text, or the sizes by axis; see `common.sharding`.

    Raises:
      ValueError: The text is wrong, the mesh does not take all processes, they do not meet, or the
        strategy is not in `STRATEGIES`.
    """
    from torch.distributed.device_mesh import init_device_mesh

    join()
    count = dist.get_world_size()
    sizes = _offered(parse_mesh(mesh if isinstance(mesh, str) else mesh_text(mesh), count))
    if math.prod(sizes.values()) != count:
        raise UserError(f"a mesh must take all {count} processes, got {mesh_text(sizes)}")
    sizes = {axis: sizes.get(axis, 1) for axis in AXES if axis in {*sizes, "fsdp"}}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shard(model: Model, mesh: DeviceMesh, lora: LoraOptions | None = None) -> None:
    """Splits a model block by block as `common.sharding.split_of` says, also on the meta device.

    What the mesh does not divide is split by rows, unevenly.

    Args:
      model: The model, perhaps with adapters.
      mesh: The processes.
      lora: The adapters, if it has any.

    Raises:
      ValueError: The mesh does not fit the model, or is of another strategy than `STRATEGIES`.
      RuntimeError: This version of PyTorch cannot split a model.
    """
    if TorchVersion(torch.__version__) < _NEEDED:
        raise RuntimeError(
            f"a model is split with PyTorch {_NEEDED} or newer, got {torch.__version__}"
        )
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    for module in model.modules():  # FSDP splits parameters alone
        if isinstance(module, QuantizedMatrix):
            module.packs = False  # into the layout of a kernel, which is not split
        for name, buffer in list(module.named_buffers(recurse=False)):
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    sizes = sizes_of(mesh)
    splits, parts = splits_of(model.config, mesh, lora), sizes["fsdp"]
    axes: dict[int, int] = {}
    total, kept = 0, 0
    for _, path, parameter, by_rows in owners(model):
        split = splits[path]
        split = (*split[:-2], *split[:-3:-1]) if by_rows else torch_shape(path, split)
        found = [i for i, axis in enumerate(split) if axis == "fsdp"]
        # The scale of a quantised matrix has a 1 where the matrix is reduced.
        axis = next((i for i in found if parameter.shape[i] % parts == 0), 0)
        axes[id(parameter)] = axis
        total += parameter.nbytes
        kept += parameter.nbytes // parameter.shape[axis] * -(-parameter.shape[axis] // parts)
    if kept * parts > _BALANCE * total:
        require_fit(model.config, sizes)

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
    sizes = {} if mesh is None else sizes_of(mesh)
    specs = (*layer_spec(config), *(trainable_specs(config, lora) if lora else ()))
    return {spec.path: split_of(spec, sizes) for spec in specs}


def owners(model: Model) -> Iterator[tuple[str, str, Tensor, bool]]:
    """Name, path in the layout, tensor and form of each parameter and buffer of a model.

    The model may have adapters: a module around another, its `base`, says by `owner` whose layout
    its own tensors have. The form is whether a tensor is a part of a `QuantizedMatrix`, which has
    rows of outputs.
    """
    for name, module in model.named_modules():
        place = [part for part in name.split(".") if part != "base"]
        owner, by_rows = getattr(module, "owner", flax_path), isinstance(module, QuantizedMatrix)
        own = module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        for leaf, parameter in itertools.chain(*own):
            full = f"{name}.{leaf}" if name else leaf
            path = flax_path(".".join(place)) if by_rows else ".".join([*place, owner(leaf)])
            yield full, path, parameter, by_rows


def part_of(tensor: Tensor, place: Tensor) -> Tensor:
    """This process's part of a tensor, which every process has or has a part of.

    It is split like `place` along the axes that have the same size; the tensor itself if that is
    not split.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(place, DTensor):
        return tensor
    mesh, placements = place.device_mesh, inherited(place, tensor.shape)
    if isinstance(tensor, DTensor):
        return tensor.redistribute(mesh, placements)
    return distribute_tensor(tensor.contiguous(), mesh, placements, src_data_rank=None)


def inherited(place: DTensor, shape: Sequence[int]) -> list[Placement]:
    """How a moment of a split parameter is split: as that is, along axes of the same size."""
    from torch.distributed.tensor import Replicate, Shard

    return [
        Replicate() if isinstance(p, Shard) and shape[p.dim] != place.shape[p.dim] else p
        for p in place.placements
    ]


def zeros(place: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros for a moment of a parameter, split as it is; see `part_of`."""
    if mesh_of([place]) is None:
        return place.new_zeros(shape)
    from torch.distributed.tensor import zeros

    split: Any = place
    how = {"dtype": place.dtype, "device_mesh": split.device_mesh}
    return zeros(*shape, placements=inherited(split, shape), **how)


def local_slices(place: DTensor) -> tuple[slice, ...]:
    """Which part of a tensor this process has."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = place.device_mesh, place.placements
    sizes, offsets = compute_local_shape_and_global_offset(place.shape, mesh, placements)
    return tuple(slice(i, i + size) for i, size in zip(offsets, sizes, strict=True))


def placed(local: Tensor, place: DTensor) -> DTensor:
    """The split tensor of which this process has a part, split like `place`."""
    from torch.distributed.tensor import DTensor

    mesh = place.device_mesh
    local = local.to(mesh.device_type).contiguous()
    shape = {"shape": place.shape, "stride": place.stride()}
    return DTensor.from_local(local, mesh, place.placements, run_check=False, **shape)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh of the first split tensor; None if no tensor is split."""
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. If processes hold parts of it, all must call this together."""
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
    return tensor
