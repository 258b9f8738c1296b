"""How low-rank adapters enter the forward pass, and leave it merged into the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from recurrentgemma.common.model.layer_spec import layer_spec, sample_param
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.training.lora import LoraOptions, adapter_specs, quantize
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma.torch.layers import BlockDiagonalLinear, Einsum
from recurrentgemma.torch.optimizer import turned
from recurrentgemma.torch.runtime.arrays import to_array
from recurrentgemma.torch.scan.gates import wide_dtype


class Adapted(nn.Module):
    """y = x W + b + alpha / rank (x A) B, W and b frozen.

    Attributes:
      base: The module that computes x W + b; where W is quantised, without a W of its own.
      leaf: What it calls W.
    """

    values: Tensor | None
    scale: Tensor | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, base: nn.Module, leaf: str, options: LoraOptions) -> None:
        super().__init__()
        self.base, self.leaf, self.options = base, leaf, options
        self.register_buffer("values", None)
        self.register_buffer("scale", None)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def forward(self, x: Float[Tensor, "b t i"]) -> Any:
        if self.values is not None:
            whole = {self.leaf: self.value(self.leaf).to(x.dtype)}
            y = functional_call(self.base, whole, (x,))
        else:
            y = self.base(x)
        if self.lora_a is None or self.lora_b is None:
            return y
        delta = _product(self.base, x, self.options.scale * self.lora_a, self.lora_b)
        if isinstance(y, tuple):
            return tuple(part + d for part, d in zip(y, delta, strict=True))
        return y + delta

    def value(self, leaf: str) -> Tensor:
        """A parameter of the base; W dequantised, in float32, where it is quantised."""
        if leaf != self.leaf or self.values is None or self.scale is None:
            return self.base.get_parameter(leaf)
        return self.values.to(self.scale.dtype) * self.scale


def adapt(
    model: Griffin, options: LoraOptions, dtype: torch.dtype, seed: int
) -> tuple[Griffin, dict[str, Tensor]]:
    """A model on the frozen tensors of another, which it shares, and its adapters.

    Args:
      model: Stays as it is.
      options: What to adapt and how.
      dtype: Of the adapters.
      seed: Of their initial values.

    Returns:
      The model, and A and B of each target by the paths of `adapter_specs`.
    """
    result = _sharing(model.state_dict(), model)
    result.requires_grad_(False)
    adapters: dict[str, Tensor] = {}
    for spec in layer_spec(model.config):
        if spec.lora is None or not (options.quantize or spec.lora in options.targets):
            continue
        path, _, leaf = torch_name(spec.path).rpartition(".")
        parent, _, name = path.rpartition(".")
        module = Adapted(result.get_submodule(path), leaf, options)
        weight = module.base.get_parameter(leaf)
        if options.quantize:
            quantized = quantize(to_torch(spec.path, to_array(weight)))
            module.values, module.scale = (
                turned(torch.from_numpy(part), spec).to(weight.device) for part in quantized
            )
            empty = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
            module.base.register_parameter(leaf, empty)
        if spec.lora in options.targets:
            for matrix in adapter_specs(spec, options.rank):
                value = torch.from_numpy(sample_param(matrix, seed)).to(weight.device, dtype)
                parameter = nn.Parameter(value)
                module.register_parameter(matrix.path.rpartition(".")[2], parameter)
                adapters[matrix.path] = parameter
        setattr(result.get_submodule(parent), name, module)
    return result, adapters


def merge(
    model: Griffin, adapters: Mapping[str, Tensor], options: LoraOptions, dtype: torch.dtype
) -> Griffin:
    """A plain model that computes what the adapted one does, in a dtype."""
    modules = dict(model.named_modules())
    state: dict[str, Tensor] = {}
    for spec in layer_spec(model.config):
        path, _, leaf = torch_name(spec.path).rpartition(".")
        module = modules[path]
        value = module.value(leaf) if isinstance(module, Adapted) else module.get_parameter(leaf)
        value = value.detach()
        if spec.lora in options.targets:
            a, b = (
                adapters[matrix.path].detach().to(wide_dtype(dtype))
                for matrix in adapter_specs(spec, options.rank)
            )
            value = value.to(a.dtype) + options.scale * turned(a @ b, spec)
        state[torch_name(spec.path)] = value.to(dtype)
    return _sharing(state, model)


def _sharing(state: Mapping[str, Tensor], model: Griffin) -> Griffin:
    """A model like another, of these tensors."""
    result = Griffin(model.config, model.gradient_checkpointing, device="meta")
    result.load_state_dict(state, assign=True)
    return result


def _product(module: nn.Module, x: Float[Tensor, "b t i"], a: Tensor, b: Tensor) -> Any:
    """x A B, in the dtype of x, as the module arranges a product with its own kernel."""
    a_cir, b_crj = (m.to(x.dtype).reshape(-1, *m.shape[-2:]) for m in (a, b))
    if isinstance(module, BlockDiagonalLinear):
        x_cbti = torch.stack(x.chunk(len(a_cir), -1))
    else:
        x_cbti = x[None]
    y_cbtj = x_cbti @ a_cir[:, None] @ b_crj[:, None]
    if isinstance(module, BlockDiagonalLinear):
        return torch.cat(y_cbtj.unbind(), -1)
    return y_cbtj.unbind() if isinstance(module, Einsum) else y_cbtj[0]
