"""How many bytes a model takes: its parameters, its state and its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec, state_spec
from recurrentgemma.common.quantization import stored_bytes
from recurrentgemma.common.sharding import Mesh, inherited, layout, share
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.common.training.optimization import OptimizerOptions, moment_shapes

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
_STATE_BYTES = 4  # optimisers keep their state in float32
# The rows of `training_table`: the optimiser, and the adapters if they alone are trained.
_METHODS: Mapping[str, tuple[str, LoraOptions | None]] = {
    "adamw": ("adamw", None),
    "adafactor": ("adafactor", None),
    "sgd": ("sgd", None),
    "lora rank 8, adamw": ("adamw", LoraOptions(rank=8)),
    "lora rank 8 on int8, adamw": ("adamw", LoraOptions(rank=8, quantize=True)),
}


def parameter_bytes(config: Config, dtype: str, scheme: str | None = None) -> int:
    """Bytes of all parameters, stored in one dtype, or the matrices in a scheme."""
    return sum(stored_bytes(spec, VALUE_BYTES[dtype], scheme) for spec in layer_spec(config))


def state_bytes(config: Config, dtype: str, capacity: int | None = None) -> int:
    """Bytes of one sequence's state, computed in `dtype`, with room for `capacity` tokens."""
    size = {"wide": 4, "int32": 4, "compute": VALUE_BYTES[dtype]}
    specs = state_spec(config, capacity)
    return sum(math.prod(spec.shape) * size[spec.dtype] for spec in specs)


class TrainingBytes(NamedTuple):
    """Bytes that training holds all the time: all but the activations.

    Attributes:
      parameters: The parameters of the forward pass; under adapters, the frozen ones.
      trained: The float32 copy that the optimiser changes; 0 where it needs none.
      gradients: The gradients, in float32.
      optimizer: The optimiser's state, in float32.
    """

    parameters: int
    trained: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum of the four."""
        return sum(self)


def training_bytes(
    config: Config,
    dtype: str,
    optimizer: OptimizerOptions,
    lora: LoraOptions | None = None,
    mesh: Mesh | None = None,
) -> TrainingBytes:
    """Bytes of training with the optimiser's state in float32.

    Args:
      config: The model.
      dtype: The dtype of the parameters in the forward pass.
      optimizer: The optimiser.
      lora: The adapters to train; None trains the model's own parameters.
      mesh: The mesh that all lies on, if any; the bytes are then those of one device.
    """
    size, trainable = VALUE_BYTES[dtype], trainable_specs(config, lora)
    splits = {} if mesh is None else layout(config, mesh, lora)
    shapes = {spec.path: spec.shape for spec in trainable}

    def kept(moments: Mapping[str, tuple[int, ...]]) -> int:
        """The bytes of arrays that lie as the parameters do whose paths they have."""
        if mesh is None:
            return _bytes(moments.values(), _STATE_BYTES)
        parts = (
            math.prod(shape) // share(inherited(splits[path], shape, shapes[path]), mesh)
            for path, shape in moments.items()
        )
        return _STATE_BYTES * sum(parts)

    def base(spec: ParamSpec) -> int:
        scheme = None if lora is None or spec.table else lora.scheme
        whole = stored_bytes(spec, size, scheme)
        return whole if mesh is None else whole // share(splits[spec.path], mesh)

    trained = kept(shapes)
    return TrainingBytes(
        parameters=sum(map(base, layer_spec(config))),
        trained=0 if lora is None and size == _STATE_BYTES else trained,
        gradients=trained,
        optimizer=sum(map(kept, moment_shapes(optimizer, trainable).values())),
    )


def training_table(
    config: Config, dtype: str, mesh: Mesh | None = None
) -> dict[str, TrainingBytes]:
    """`training_bytes` of the usual methods, by name; SGD has no momentum there."""
    return {
        name: training_bytes(config, dtype, OptimizerOptions(optimizer), lora, mesh)
        for name, (optimizer, lora) in _METHODS.items()
    }


def _bytes(shapes: Iterable[tuple[int, ...]], size: int) -> int:
    return size * sum(math.prod(shape) for shape in shapes)
