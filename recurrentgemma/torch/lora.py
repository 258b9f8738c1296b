"""Low-rank adapters in the forward pass, and merged into the parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recurrentgemma.common.model.layer_spec import layer_spec, sample_param
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.model.state_dict import flax_path, to_torch, torch_name
from recurrentgemma.common.quantization import dequantize
from recurrentgemma.common.training.lora import (
    LoraOptions,
    adapter_specs,
    lora_targets,
    trainable_specs,
)
from recurrentgemma.common.training.lora import merge as merge_on_host
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.quantization import (
    QuantizedMatrix,
    dequantizing,
    parameter,
    quantize_matrices,
    quantized_tensor,
    replace,
)
from recurrentgemma.torch.runtime.arrays import to_array, to_tensor
from recurrentgemma.torch.runtime.split_tensors import part_of, whole
from recurrentgemma.torch.runtime.teams import ALONE, AXIS, SplitOf, Team
from recurrentgemma.torch.scan.gates import wide_dtype
from recurrentgemma.torch.sharding import owners, shard
from recurrentgemma_conversion.adapters import open_adapters


class Adapted(nn.Module):
    """y = x W + b + alpha / rank (x A) B.

    Attributes:
      base: The module that computes x W + b.
      lora_a: A.
      lora_b: B.
    """

    def __init__(
        self, base: nn.Module, leaf: str, a: nn.Parameter, b: nn.Parameter, scale: float
    ) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.scale = base, a, b, scale
        self._leaf = leaf
        self._sharing, self._adding = ALONE, ALONE  # the teams that share A, and that add up x A

    def _join(self, team: Team, split: SplitOf) -> None:
        """Computes its part in a team from now on."""
        parts = [AXIS in split(name) for name in ("lora_a", "lora_b")]
        self._sharing = team if parts == [False, True] else ALONE
        self._adding = team if parts == [True, False] else ALONE

    def forward(self, x: Float[Tensor, "b t i"]) -> Any:
        y = self.base(x)
        a = self._sharing.shared(self.scale * self.lora_a)
        delta = _product(x, a, self.lora_b, self._adding)
        if isinstance(y, tuple):
            return tuple(part + d for part, d in zip(y, delta, strict=True))
        return y + delta.reshape(y.shape)

    def owner(self, leaf: str) -> str:
        """The adapter whose layout a tensor has."""
        return f"{flax_path(self._leaf)}.{leaf}"


def adapt(
    model: Model, options: LoraOptions, dtype: torch.dtype, seed: int
) -> tuple[Model, dict[str, Tensor]]:
    """A model on the frozen tensors of another, and its adapters.

    Args:
      model: The other model. Its tensors are shared, except for matrices that are quantised.
      options: What to adapt, and how.
      dtype: The dtype of the adapters.
      seed: Determines their initial values.

    Returns:
      The model, and A and B of each target by the paths of `adapter_specs`.
    """
    state, device = model.state_dict(), next(model.parameters()).device
    drawn = {
        spec.path: torch.from_numpy(sample_param(spec, seed)).to(device, dtype)
        for spec in trainable_specs(model.config, options)
    }
    mesh = model.mesh
    split, like = mesh is not None, model.embedder.input_embedding.dtype
    result = Model(model.config, model.gradient_checkpointing, "meta", like) if split else None
    result = _sharing(model) if result is None else result
    result.requires_grad_(False)
    quantize_matrices(result, options.scheme, tables=False)
    dequantizing(result)
    for target in lora_targets(model.config, options):
        pair = (drawn[spec.path] for spec in adapter_specs(target, options.rank))
        a, b = (nn.Parameter(z.to("meta") if split else z) for z in pair)
        path, _, leaf = torch_name(target.path).rpartition(".")
        result.set_submodule(path, Adapted(result.get_submodule(path), leaf, a, b, options.scale))
    if mesh is not None:
        shard(result, mesh, options)
        result.load_state_dict(dict(_parts(result, state | drawn)), assign=True)
    own = {path: tensor for _, path, tensor, _ in owners(result)}
    return result, {path: own[path] for path in drawn}


def _parts(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """This process's parts of the tensors of an adapted model, by name.

    Args:
      model: The model, split; its tensors have no values.
      tensors: Those of the plain model and the adapters.
    """
    specs = {spec.path: spec for spec in layer_spec(model.config)}
    for name, path, place, by_rows in owners(model):
        value = tensors[torch_name(path)]
        if by_rows:
            module, _, leaf = name.rpartition(".")
            scheme: Any = model.get_submodule(module).scheme
            value = getattr(quantized_tensor(specs[path], whole(value), scheme), leaf)
        yield name, part_of(value, place)


def merge(
    model: Model, adapters: Mapping[str, Tensor], options: LoraOptions, dtype: torch.dtype
) -> Model:
    """A plain model, in a dtype, that computes what the adapted one does."""
    merged: dict[str, Tensor] = {}
    for spec in layer_spec(model.config):
        value = _matrix(model, spec)
        if spec.lora in options.targets:
            a, b = (
                whole(adapters[matrix.path].detach()).to(wide_dtype(dtype))
                for matrix in adapter_specs(spec, options.rank)
            )
            value = value.to(a.dtype) + part_of(options.scale * to_torch(spec.path, a @ b), value)
        merged[spec.path] = value.to(dtype)
    return _sharing(model, merged)


def load_adapters(path: str | os.PathLike[str], model: Model) -> Model:
    """A model with the adapters in a file merged into its parameters.

    Args:
      path: A file of ours or its folder, or a folder of PEFT's.
      model: The model. It does not change; tensors without adapters are shared.

    Raises:
      CheckpointError: There are no adapters, they are damaged, or belong to another model.
    """
    _, options, arrays = open_adapters(path, model.config)
    changed: dict[str, Tensor] = {}
    for spec in layer_spec(model.config):
        value = _matrix(model, spec)
        on_host = to_torch(spec.path, to_array(whole(value)))
        merged = merge_on_host(spec, on_host, arrays, options)
        if merged is not on_host:
            changed[spec.path] = to_tensor(to_torch(spec.path, merged)).to(value)
    return _sharing(model, changed)


def _matrix(model: Model, spec: ParamSpec) -> Tensor:
    """A parameter, or the whole of the matrix that a `QuantizedMatrix` stands for."""
    value = parameter(model, spec)
    if isinstance(value, QuantizedMatrix):
        held = value.quantized.with_parts(whole)
        return dequantize(held, torch.stack).to(value.dtype)
    return value.detach()


def _sharing(model: Model, changed: Mapping[str, Tensor] = MappingProxyType({})) -> Model:
    """A model like another, on its tensors but for some, which are given by their paths."""
    result = Model(model.config, model.gradient_checkpointing, device="meta")
    specs = layer_spec(model.config)
    values = {spec: changed.get(spec.path, parameter(model, spec)) for spec in specs}
    if model.mesh is not None:
        shard(result, model.mesh)
    places, state = result.state_dict(), dict[str, Tensor]()
    for spec, value in values.items():
        name = torch_name(spec.path)
        if isinstance(value, QuantizedMatrix):
            replace(result, spec, value.quantized)
        else:
            state[name] = part_of(value.detach(), places[name])
    result.load_state_dict(result.state_dict() | state, assign=True)
    return result


def _product(x: Float[Tensor, "b t i"], a: Tensor, b: Tensor, team: Team) -> Tensor:
    """x A B, in the dtype of x: one product, or one for each matrix of a stack, [C, B, T, J].

    In a block-diagonal layer each matrix has its own part of x, and of the result. A team adds up
    what its parts of x and of A give.
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    if a.ndim == 2:
        return team.total(x @ a) @ b
    blocks = x.shape[-1] // a.shape[-2]
    x_cbti = torch.stack(x.chunk(blocks, -1))
    y_cbtj = x_cbti @ a[:, None] @ b[:, None]
    return y_cbtj if blocks == 1 else torch.cat(y_cbtj.unbind(), -1)
