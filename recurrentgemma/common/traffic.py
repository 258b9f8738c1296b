"""What a training step on a mesh sends between devices and computes on each, before it runs.

A block's weights are gathered twice, in the forward pass and where the backward pass computes the
block again; their gradients are added up once. Bytes are those that one device sends where n
devices pass parts around a ring: (n - 1) / n of an array that is gathered or scattered, twice that
of one that is added up on all.

Where "sequence" splits the tokens of a row, devices pass on the state of a recurrence, the inputs
of a convolution, and keys and values: as many as the attention reaches, or all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.common.model.memory import VALUE_BYTES, training_bytes
from recurrentgemma.common.sharding import TOKEN_AXES, Mesh, layout, require_fit, share
from recurrentgemma.common.training.optimization import OptimizerOptions

# Products over the width that "tensor" ends with a sum on all devices: those of the outputs, again
# in the backward pass, and those of the gradients of the inputs.
_RECURRENT_SUMS, _ATTENTION_SUMS = 2 + 1 + 3, 2 + 1 + 2
_TIMES = 3  # tokens pass between neighbours forward, again, and backward


class Traffic(NamedTuple):
    """One step of training with AdamW, on each device.

    Attributes:
      collectives: Bytes that it sends, by kind of collective.
      memory: Bytes that it holds all the time; activations come on top.
      operations: Additions and multiplications of its matrix products with the weights.
    """

    collectives: dict[str, int]
    memory: int
    operations: int

    @property
    def sent(self) -> int:
        """Bytes that a device sends."""
        return sum(self.collectives.values())

    def seconds(self, operations: float, sent: float) -> float:
        """The least time of a step, with computing and sending at the same time.

        Args:
          operations: Operations that a device does in a second, at its peak.
          sent: Bytes that a device sends in a second, at its peak.
        """
        return max(self.operations / operations, self.sent / sent)


def traffic(config: Config, mesh: Mesh, rows: int, length: int, dtype: str = "bfloat16") -> Traffic:
    """What one step on `rows` rows of `length` tokens takes.

    Args:
      config: The model.
      mesh: The mesh.
      rows: Rows of the whole batch.
      length: Tokens of a row.
      dtype: The dtype of the computation.

    Raises:
      ValueError: The mesh does not fit the model or the batch.
    """
    require_fit(config, mesh, rows=rows, length=length)
    size, splits = VALUE_BYTES[dtype], layout(config, mesh)
    sequence, tensor = mesh.get("sequence", 1), mesh.get("tensor", 1)
    apart = {axis: mesh.get(axis, 1) for axis in TOKEN_AXES}  # devices with tokens of their own
    tokens = rows * length // math.prod(apart.values())
    sent: Counter[str] = Counter()

    def ring(kind: str, devices: int, values: float, times: float = 1) -> None:
        if devices > 1:
            sent[kind] += math.ceil(times * size * values * (devices - 1) / devices)

    for spec in layer_spec(config):
        split, is_table = splits[spec.path], spec.path == "embedder.input_embedding"
        here = spec.size // (tensor if "tensor" in split else 1)
        if is_table and split[0] in apart:
            # The slices go around for the lookup and its gradient, and twice for the loss; their
            # gradients, which are wide, go all the way around.
            devices = apart[split[0]]
            ring("collective-permute", devices, here, 4)
            sent["collective-permute"] += 4 * here // devices * (devices - 1)
            sent["collective-permute"] += 4 * here // devices
            here, split = here // devices, split[1:]
        gathered = share((axis for axis in split if axis in apart), mesh)
        # XLA merges the table's two gathers, for the lookup and for the loss.
        ring("all-gather", gathered, here, 1 if is_table else 2)
        ring("reduce-scatter", gathered, here, 2 if is_table else 1)
        others = math.prod(n for axis, n in apart.items() if axis not in splits[spec.path])
        ring("all-reduce", others, here / gathered, 2)
    model = config.model
    for layer in model.layers:
        mixer: Any = layer.mixer
        sums = _RECURRENT_SUMS if mixer.kind == "recurrent" else _ATTENTION_SUMS
        ring("all-reduce", tensor, tokens * model.width, 2 * sums)
        if mixer.kind == "attention" and mixer.kv_heads % tensor:
            ring("all-reduce", tensor, tokens * mixer.kv_heads * mixer.head_dim, 4)
        if sequence > 1:
            part = tokens * sequence // length  # rows of a device
            sent["collective-permute"] += part * _between(mixer, sequence, length, size)
    ring("all-reduce", tensor, tokens * model.width, 2 * (1 + 4 / size))  # lookup; loss, wide
    memory = training_bytes(config, dtype, OptimizerOptions(), mesh=mesh).total
    # 2 forward, 2 again, 4 backward; the table has no second forward pass unless it goes around.
    table = model.vocab_size * model.width
    again = 2 if splits["embedder.input_embedding"][0] in apart else 0
    each = 8 * (num_parameters(config) - table) + (6 + again) * table
    return Traffic(dict(sent), memory, each * tokens // tensor)


def _between(mixer: Any, devices: int, length: int, size: int) -> int:
    """Bytes that a device sends to its neighbours for a layer and each of its rows."""
    others = length - length // devices
    if mixer.kind == "attention":
        places = others if mixer.reach is None else min(mixer.reach, others)
        return _TIMES * size * places * 2 * mixer.kv_heads * mixer.head_dim
    # The states are wide: what a part adds, and its decay, twice as far each time; then the state.
    hops = (devices - 1).bit_length()
    inputs = _TIMES * size * min(mixer.taps - 1, others)
    return mixer.width * (inputs + _TIMES * 4 * (2 * hops + 1) + 4)
