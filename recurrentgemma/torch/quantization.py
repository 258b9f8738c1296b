"""Computing with matrices that are kept as int8: each is dequantised where it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import flax_path, to_torch, torch_name
from recurrentgemma.common.quantization import Quantized, dequantize, quantize
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.runtime.arrays import to_array


def quantize_matrices(model: Model) -> None:
    """Puts a `Dequantizing` in the place of each module that holds a matrix."""
    for spec in layer_spec(model.config):
        if spec.matrix:
            path, _, leaf = torch_name(spec.path).rpartition(".")
            module = model.get_submodule(path)
            quantized = quantized_tensor(spec.path, module.get_parameter(leaf))
            model.set_submodule(path, Dequantizing(module, leaf, quantized))


def quantized_tensor(path: str, weight: Tensor) -> Quantized:
    """A parameter, as PyTorch has it, in its two parts; on "meta" without values."""
    if weight.is_meta:
        whole = to_torch(path, torch.empty(weight.shape, device="meta"))
        scale = to_torch(path, whole[..., :1, :])
        return Quantized(torch.empty_like(weight, dtype=torch.int8), torch.empty_like(scale))
    parts = quantize(to_torch(path, to_array(weight)))
    return Quantized(*(to_torch(path, torch.from_numpy(part)).to(weight.device) for part in parts))


class Dequantizing(nn.Module):
    """A module that computes with a `Quantized` in the place of a parameter.

    The matrix has the dtype of the module's input: it exists only during the module's call.

    Attributes:
      base: The module, without the parameter.
      leaf: Its name for the parameter.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, base: nn.Module, leaf: str, quantized: Quantized) -> None:
        super().__init__()
        self.base, self.leaf = base, leaf
        self.register_buffer("values", quantized.values)
        self.register_buffer("scale", quantized.scale)
        base.register_parameter(leaf, None)

    def forward(self, x: Tensor) -> Any:
        matrix = self.get_parameter(self.leaf).to(x.dtype)
        return functional_call(self.base, {self.leaf: matrix}, (x,))

    def get_parameter(self, target: str) -> Any:
        """A parameter of the module; the quantised one in float32."""
        if target != self.leaf:
            return self.base.get_parameter(target)
        return dequantize(Quantized(self.values, self.scale))

    def owner(self, leaf: str) -> str:
        """The parameter whose layout its tensors have."""
        return flax_path(self.leaf)
