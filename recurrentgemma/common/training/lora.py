"""Low-rank adapters (LoRA, arXiv 2106.09685): which parameters have them, and what they add.

A target is a stack of matrices [..., I, J]: a linear layer's kernel, the MLP's two matrices, the
blocks of an RG-LRU's gate. Its adapters are A, [..., I, rank], and B, [..., rank, J]; they add
alpha / rank * A B.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.init import Init, Normal, Zeros
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.quantization import dequantize, quantize, require_scheme, scheme_for
from recurrentgemma.common.scalars import make_plain

TARGETS = ("attention", "recurrent", "mlp", "gates")
MAGNITUDE = "lora_magnitude"  # DoRA's array beside A and B, [..., J]


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Which parameters have adapters, and of what size.

    Attributes:
      rank: Columns of A and rows of B.
      alpha: The adapters' product is scaled by alpha / rank.
      targets: `ParamSpec.lora` of these parameters: some of "attention", "recurrent", "mlp" and
        "gates".
      quantize: The scheme of `common.quantization` in which all matrices under the adapters are
        kept, or False; True means "q8". The embedding stays as it is.

    Raises:
      ValueError: An option is out of range; the message names it.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention", "recurrent", "mlp")
    quantize: bool | str = False

    def __post_init__(self) -> None:
        make_plain(self)
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"alpha must be positive, got {self.alpha}")
        if self.scheme is not None:
            require_scheme(self.scheme)
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise UserError(f"targets must be some of {', '.join(TARGETS)}, got {self.targets}")

    @property
    def scheme(self) -> str | None:
        """The scheme of the matrices under the adapters, if they are quantised."""
        return "q8" if self.quantize is True else self.quantize or None

    def changes(self, spec: ParamSpec) -> bool:
        """Whether `merge` changes a parameter."""
        return spec.lora in self.targets or (spec.matrix and self.scheme is not None)

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank


def require_plain(quantized: bool) -> None:
    """Raises `ValueError` for a training of all parameters where some are quantised."""
    if quantized:
        raise UserError(
            "quantised weights cannot be trained, since a small change is lost in the rounding: "
            "train adapters on them (lora=LoraOptions(), --lora-rank 8), or load the checkpoint "
            "that they were made from (a GGUF: with a dtype)"
        )


@functools.lru_cache(maxsize=32)
def lora_targets(config: Config, options: LoraOptions) -> tuple[ParamSpec, ...]:
    """The parameters that have adapters.

    Raises:
      ValueError: The model has no such parameters.
    """
    targets = tuple(spec for spec in layer_spec(config) if spec.lora in options.targets)
    if not targets:
        raise UserError(f"the model has no parameters of the targets {options.targets}")
    return targets


def adapter_specs(target: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """The specs of a target's A and B: "<path>.lora_a", "<path>.lora_b"; B starts at zero."""
    *stack, rows, columns = target.shape
    *stack_axes, row_axis, column_axis = target.axes

    def spec(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> ParamSpec:
        path = f"{target.path}.{name}"
        return target._replace(
            path=path, shape=shape, init=init, axes=axes, lora=None, matrix=False
        )

    a_axes, b_axes = (*stack_axes, row_axis, "rank"), (*stack_axes, "rank", column_axis)
    return (
        spec("lora_a", (*stack, rows, rank), a_axes, Normal(1 / math.sqrt(rows))),
        spec("lora_b", (*stack, rank, columns), b_axes, Zeros()),
    )


@functools.lru_cache(maxsize=32)
def trainable_specs(config: Config, lora: LoraOptions | None) -> tuple[ParamSpec, ...]:
    """The parameters that training changes: the model's without `lora`, else the adapters'."""
    if lora is None:
        return layer_spec(config)
    return tuple(
        spec for target in lora_targets(config, lora) for spec in adapter_specs(target, lora.rank)
    )


def num_trainable(config: Config, lora: LoraOptions | None) -> int:
    """The number of values that training changes."""
    return sum(spec.size for spec in trainable_specs(config, lora))


def merge(
    spec: ParamSpec, value: np.ndarray, adapters: Mapping[str, np.ndarray], options: LoraOptions
) -> np.ndarray:
    """A parameter of a plain model that computes what the adapted one does.

    With a magnitude m (DoRA, arXiv 2402.09353), column j is scaled to the norm m[j].

    Args:
      spec: Describes the parameter.
      value: Its value under the adapters.
      adapters: A and B of each target, by the paths of `adapter_specs`; "<path>.lora_magnitude",
        [..., J], where there is one.
      options: The options that they were trained with.

    Returns:
      The parameter; what adapters or quantisation changed is in float32, or float64 from float64.
      Any other is `value` itself.
    """
    wide = np.float64 if value.dtype == np.float64 else np.float32
    if spec.matrix and (scheme := scheme_for(spec, options.scheme)):
        value = np.asarray(dequantize(quantize(value, scheme, name=spec.path)), wide)
    if spec.lora not in options.targets:
        return value
    a, b = (np.asarray(adapters[s.path], wide) for s in adapter_specs(spec, options.rank))
    value = np.asarray(value, wide) + wide(options.scale) * (a @ b)
    magnitude = adapters.get(f"{spec.path}.{MAGNITUDE}")
    if magnitude is not None:
        norm = np.linalg.norm(value, axis=-2, keepdims=True)
        value = value * (np.asarray(magnitude, wide)[..., None, :] / norm)
    return value
