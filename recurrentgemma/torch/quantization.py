"""A model's matrices in fewer bytes (see `common.quantization`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.model.state_dict import is_kernel, to_torch, torch_name
from recurrentgemma.common.quantization import (
    SCHEMES,
    Quantized,
    input_axis,
    part_shapes,
    quantize,
    scheme_for,
)
from recurrentgemma.torch.runtime import kernels
from recurrentgemma.torch.runtime.arrays import to_array, to_tensor
from recurrentgemma.torch.runtime.stored import PackedMatrix, gains


class QuantizedMatrix(nn.Module):
    """A `Quantized` in the place of a module's parameter, under its name.

    Its arrays are buffers, so that state dicts, copies, pickles and `to` treat them as they treat
    parameters; their dtypes never change. A cast of the model changes `dtype`.

    Attributes:
      values: See `Quantized`, whose other fields this has, too.
      scale: See `Quantized`.
      zero: See `Quantized`.
      shape: The shape of the matrix that this stands for.
      dtype: The dtype that the matrix has in a computation.
      packs: Whether a kernel's layout may take the place of the values (see `pack`).
    """

    values: Any
    scale: Tensor
    zero: Tensor | None

    def __init__(self, quantized: Quantized, packs: bool = True) -> None:
        super().__init__()
        self.register_buffer("values", quantized.values)
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("zero", quantized.zero)
        self.scheme, self.axis, self.integer = quantized.scheme, quantized.axis, quantized.integer
        self.packs, self._packed = packs, None
        kernels.plain8_works()  # found before anything traces it
        self.shape = torch.Size(quantized.shape)
        self.dtype: torch.dtype = getattr(torch, quantized.dtype)

    @property
    def quantized(self) -> Quantized:
        """The same as a `Quantized` of tensors."""
        parts = self._values(), self.scale, self.zero
        name = str(self.dtype).removeprefix("torch.")
        return Quantized(*parts, self.scheme, self.axis, name, self.integer)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors, packed or not."""
        values = math.prod(self.shape) * SCHEMES[self.scheme].bits // 8
        return values + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.scale.device

    def __len__(self) -> int:
        return self.shape[0]

    def extra_repr(self) -> str:
        return f"{self.scheme} {list(self.shape)}"

    def pack(self, joined: bool = False) -> list[Any] | None:
        """The matrices as the kernel of their bits takes them; None if it does not.

        They hold the values from then on: `values` is None until `unpack`.

        Args:
          joined: Whether a stack may be one matrix of all its outputs: its matrices are multiplied
            with the same rows.
        """
        if self._packed is not None:
            return self._packed if joined or len(self._packed) == self._count() else None
        if not self.packs or torch.compiler.is_compiling():
            return None
        shape = (1, -1) if joined else (self._count(), self.scale.shape[-2])
        values, *others = (
            part.view(*shape, part.shape[-1])
            for part in (self.values, self.scale, self.zero)
            if part is not None
        )
        if self.zero is not None and kernels.takes4(self.values, self.scale):
            self._packed = kernels.pack4(values, *others)
        elif self.zero is None and kernels.takes8(self.values):
            self._packed = kernels.pack8(values)
        if self._packed is not None:
            self.values = None
        return self._packed

    def unpack(self) -> None:
        """Makes the values again from the packed ones, if there are any."""
        if self._packed is not None:
            self.values, self._packed = self._values(), None

    def _values(self) -> Tensor:
        if self._packed is None:
            return self.values
        unpack = kernels.unpack8 if self.zero is None else kernels.unpack4
        values = torch.cat([unpack(matrix) for matrix in self._packed])
        return values.view(*self.scale.shape[:-1], -1)

    def _count(self) -> int:
        return math.prod(self.shape[:-2])

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return vars(self)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedMatrix:
        """Moves the tensors; a cast of floating-point parameters changes `dtype` alone."""
        self.unpack()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        for name, buffer in self.named_buffers(recurse=False):
            # As bytes, which no cast of floating-point tensors changes.
            setattr(self, name, fn(buffer.view(torch.uint8)).view(buffer.dtype))
        return self


def quantize_matrices(model: nn.Module, scheme: str | None = "q8", tables: bool = True) -> None:
    """Puts a `QuantizedMatrix` in the place of each matrix of a model.

    Args:
      model: The model. What is quantised already stays as it is.
      scheme: The scheme; None changes nothing.
      tables: Whether the embedding is quantised, too.

    Raises:
      ValueError: The scheme is unknown, or does not fit a matrix; the message names it.
    """
    for spec in layer_spec(model.config):  # pyright: ignore[reportArgumentType]
        name = scheme_for(spec, scheme) if tables or not spec.table else None
        value = parameter(model, spec)
        if name is not None and isinstance(value, Tensor):
            replace(model, spec, quantized_tensor(spec, value, name))


def quantized_tensor(spec: ParamSpec, value: Tensor, scheme: str) -> Quantized:
    """A parameter, as PyTorch has it, in a scheme; on "meta" without values."""
    axis = input_axis(spec)
    if value.is_meta:
        shapes = part_shapes(spec.shape, scheme, axis, spec.path)
        values, scale, zero = (
            torch.empty(shapes[part][0], dtype=getattr(torch, shapes[part][1].name), device="meta")
            if part in shapes
            else None
            for part in ("", ".scale", ".zero")
        )
        name = str(value.dtype).removeprefix("torch.")
        return Quantized(values, scale, zero, scheme, axis, name)
    held = quantize(to_torch(spec.path, to_array(value)), scheme, axis, spec.path)
    return held.with_parts(lambda part: to_tensor(part).to(value.device))


def dequantizing(model: nn.Module) -> None:
    """Has a model compute in a form that has gradients: no product quantises its rows."""
    for module in model.modules():
        if isinstance(module, QuantizedMatrix):
            module.integer = False


def keep_values(model: nn.Module) -> None:
    """Has a model compute with values as they are stored, which `torch.compile` can trace."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedMatrix):
            module.packs = False
            module.unpack()
        for name, held in list(module.named_children()):
            if isinstance(held, PackedMatrix):
                delattr(module, name)
                setattr(module, name, nn.Parameter(held.values().contiguous()))


def is_quantized(model: nn.Module) -> bool:
    """Whether any parameter is quantised."""
    return any(isinstance(module, QuantizedMatrix) for module in model.modules())


def state_of(model: nn.Module) -> dict[str, Any]:
    """A model's state dict, in which a `QuantizedMatrix` stands under the parameter's name."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedMatrix):
            for part in module.state_dict():
                del state[f"{name}.{part}"]
            state[name] = module
    return state


def parameter(model: nn.Module, spec: ParamSpec) -> Any:
    """A parameter of a model, or of the base under adapters: a tensor or a `QuantizedMatrix`."""
    path, _, leaf = torch_name(spec.path).rpartition(".")
    module = model.get_submodule(path)
    return getattr(getattr(module, "base", module), leaf)


def replace(model: nn.Module, spec: ParamSpec, quantized: Quantized) -> None:
    """Puts a quantised parameter, whose axis is the Flax layout's, in the place of another."""
    axis = -1 if is_kernel(spec.path) else quantized.axis
    held = QuantizedMatrix(quantized.replace(axis=axis), packs=not spec.table)
    _put(model, spec, held)


def pack_matrices(model: nn.Module, rows: int) -> None:
    """Puts a `PackedMatrix` in the place of each matrix with which so many rows gain by it."""
    for spec in layer_spec(model.config):  # pyright: ignore[reportArgumentType]
        value = parameter(model, spec)
        if spec.matrix and not spec.table and gains(value, rows):
            axis = -1 if is_kernel(spec.path) else input_axis(spec)
            same_rows = spec.axes[0] == "gate"  # gate and up
            _put(model, spec, PackedMatrix(value.detach(), axis, same_rows))


def _put(model: nn.Module, spec: ParamSpec, held: nn.Module) -> None:
    path, _, leaf = torch_name(spec.path).rpartition(".")
    module = model.get_submodule(path)
    delattr(module, leaf)
    module.add_module(leaf, held)
