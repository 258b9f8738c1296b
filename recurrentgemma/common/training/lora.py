"""Low-rank adapters (LoRA, arXiv 2106.09685) of the layer spec's targets, and their frozen base.

A target is a stack of matrices [..., I, J]: a linear layer's kernel, the MLP's two matrices, the
blocks of an RG-LRU's gate. An adapter adds alpha / rank times A B to each matrix of it, A being
[..., I, rank] and B [..., rank, J].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.init import Init, Normal, Zeros
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec

TARGETS = ("attention", "recurrent", "mlp", "gates")
_LARGEST = 127  # of an int8, its range being symmetric


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Which parameters have adapters, and of what size.

    Attributes:
      rank: Columns of A and rows of B.
      alpha: The adapters' product is scaled by alpha / rank.
      targets: Groups of the layer spec: "attention", "recurrent", "mlp", "gates".
      quantize: Whether the base's matrices, targets or not, are kept as int8; see `quantize`.

    Raises:
      ValueError: An option is out of its range; the message names it.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention", "recurrent", "mlp")
    quantize: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {self.targets}")

    @property
    def scale(self) -> float:
        """Of the adapters' product."""
        return self.alpha / self.rank


@functools.lru_cache(maxsize=32)
def lora_targets(config: GriffinConfig, options: LoraOptions) -> tuple[ParamSpec, ...]:
    """The parameters that have adapters.

    Raises:
      ValueError: There are none, the model having no such parameters.
    """
    targets = tuple(spec for spec in layer_spec(config) if spec.lora in options.targets)
    if not targets:
        raise ValueError(f"the model has no parameters of the targets {options.targets}")
    return targets


def adapter_specs(target: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """The specs of a target's A and B: "<path>.lora_a", "<path>.lora_b"; B starts at zero."""
    *stack, rows, columns = target.shape
    *stack_axes, row_axis, column_axis = target.axes

    def spec(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> ParamSpec:
        path = f"{target.path}.{name}"
        return ParamSpec(path, shape, init, axes, target.decay)

    a_axes, b_axes = (*stack_axes, row_axis, "rank"), (*stack_axes, "rank", column_axis)
    return (
        spec("lora_a", (*stack, rows, rank), a_axes, Normal(1 / math.sqrt(rows))),
        spec("lora_b", (*stack, rank, columns), b_axes, Zeros()),
    )


@functools.lru_cache(maxsize=32)
def trainable_specs(config: GriffinConfig, lora: LoraOptions | None) -> tuple[ParamSpec, ...]:
    """The parameters that training changes: all of the model's, or else those of the adapters."""
    if lora is None:
        return layer_spec(config)
    return tuple(
        spec for target in lora_targets(config, lora) for spec in adapter_specs(target, lora.rank)
    )


def num_trainable(config: GriffinConfig, lora: LoraOptions | None) -> int:
    """Number of values in all parameters that training changes."""
    return sum(spec.size for spec in trainable_specs(config, lora))


class Quantized(NamedTuple):
    """A stack of matrices as int8: values times scale, the scale one number a column.

    Attributes:
      values: int8, [..., I, J].
      scale: float32, [..., 1, J].
    """

    values: Any
    scale: Any


def quantize(kernel: np.ndarray) -> Quantized:
    """The nearest multiples, ties to even, of a 127th of each column's largest magnitude."""
    wide = np.asarray(kernel, np.float32)
    scale = np.abs(wide).max(-2, keepdims=True) / np.float32(_LARGEST)
    values = np.rint(wide / np.where(scale > 0, scale, np.float32(1)))
    return Quantized(values.astype(np.int8), scale)


def dequantize(quantized: Quantized) -> np.ndarray:
    """What was quantised, in float32, as near as int8 comes."""
    values, scale = quantized
    return np.asarray(values, np.float32) * scale


def merge(
    spec: ParamSpec, value: np.ndarray, adapters: Mapping[str, np.ndarray], options: LoraOptions
) -> np.ndarray:
    """A parameter as the model with adapters has it; a matrix in float32 (float64 from float64).

    Args:
      spec: Of the parameter.
      value: The base's.
      adapters: A and B of each target, by the paths of `adapter_specs`.
      options: What they were trained with.
    """
    if spec.lora is None:
        return value
    wide = np.float64 if value.dtype == np.float64 else np.float32
    value = np.asarray(dequantize(quantize(value)) if options.quantize else value, wide)
    if spec.lora not in options.targets:
        return value
    a, b = (np.asarray(adapters[s.path], wide) for s in adapter_specs(spec, options.rank))
    return value + wide(options.scale) * (a @ b)
