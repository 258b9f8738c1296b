"""A training step compiled for devices that are not there."""

from __future__ import annotations

import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recurrentgemma.common.errors import MissingExtraError, UserError
from recurrentgemma.common.extras import is_installed
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.quantization import Quantized, input_axis, spec_parts
from recurrentgemma.common.sharding import require_fit
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.common.training.optimization import OptimizerOptions, decay_mask
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.optimizer import abstract_state
from recurrentgemma.jax.runtime.collectives import sent_bytes
from recurrentgemma.jax.runtime.train_step import compiled
from recurrentgemma.jax.runtime.trees import set_path
from recurrentgemma.jax.sharding import on_mesh, place_beside, shardings, sizes_of, token_split

# The name of each generation among Google's accelerators, and the cores of a chip in that name.
_GENERATIONS = {
    "v3": ("v3", 2),
    "v4": ("v4", 2),
    "v5e": ("v5litepod", 1),
    "v5p": ("v5p", 2),
    "v6e": ("v6e", 1),
}


class CompiledStep(NamedTuple):
    """What a compiled training step takes of each device.

    Attributes:
      device: The kind of device.
      mesh: The sizes of the mesh.
      seconds: How long compiling took.
      held: Bytes of the state and the batch.
      temporary: Bytes that a step needs beside them.
      sent: Bytes that it sends, by kind of collective.
    """

    device: str
    mesh: dict[str, int]
    seconds: float
    held: int
    temporary: int
    sent: dict[str, int]


def tpu_devices(topology: str) -> list[Any]:
    """The devices of TPUs that need not be there, by a name such as "v5e:16x16".

    Raises:
      ValueError: No topology has this name.
      MissingExtraError: `libtpu` is not installed, which compiles for TPUs.
    """
    found = re.fullmatch(r"(v\d[a-z]?):(\d+(?:x\d+)+)", topology)
    if found is None or found[1] not in _GENERATIONS:
        raise UserError(
            f"a topology is {', '.join(_GENERATIONS)} and the chips of each axis, as v5e:16x16, "
            f"got {topology!r}"
        )
    if not is_installed("libtpu"):
        raise MissingExtraError("compiling for TPUs", "libtpu", "'jax[tpu]'")
    from jax.experimental import topologies

    name, cores = _GENERATIONS[found[1]]
    chips = int(np.prod([int(size) for size in found[2].split("x")]))
    # What libtpu would ask Google's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name}-{cores * chips}")
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"libtpu knows no topology {topology!r}: {reason}") from error


def lower_step(
    config: Config,
    mesh: Mesh,
    rows: int,
    length: int,
    *,
    optimizer: OptimizerOptions | None = None,
    lora: LoraOptions | None = None,
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    accumulation: int = 1,
    gradient_checkpointing: bool = True,
) -> jax.stages.Lowered:
    """The step that `train_step` runs, before it is compiled, without weights.

    Args:
      config: The model.
      mesh: The devices, which need not be there.
      rows: Rows of a batch, of all processes.
      length: Tokens of a row.
      optimizer: How to optimise; AdamW if None.
      lora: Train adapters alone.
      dtype: The dtype of the parameters in the forward pass.
      state_dtype: The dtype of the optimiser's state.
      accumulation: Batches of a step.
      gradient_checkpointing: See `Model`.

    Raises:
      ValueError: The mesh does not fit the model or the batch, or the scheme of a base does not
        fit a matrix.
    """
    require_fit(config, sizes_of(mesh), rows=rows, length=length)
    optimizer = OptimizerOptions() if optimizer is None else optimizer
    model = Model(config, gradient_checkpointing, param_dtype=jnp.dtype(dtype), mesh=mesh)
    places, specs = shardings(config, mesh, lora), trainable_specs(config, lora)

    def array(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    parameters = {s.path: array(s.shape, state_dtype, places[s.path]) for s in specs}
    moments = abstract_state(optimizer, decay_mask(specs), parameters)
    base: dict[str, Any] | None = None
    if lora is not None:
        base = {}
        for spec in layer_spec(config):
            value = array(spec.shape, jnp.dtype(dtype), places[spec.path])
            set_path(base, spec.path, _frozen(spec, value, lora.scheme))
    place = on_mesh(mesh, None, *token_split(mesh, rows, length))
    kinds = (jnp.int32, jnp.int32, jnp.int32, jnp.float32)
    batch = Batch(*(array((accumulation, rows, length), kind, place) for kind in kinds))
    arguments = model, optimizer, lora, jnp.dtype(dtype), parameters, moments, base, batch, 1e-4
    update: Any = compiled(parameters, moments).update
    return update.lower(*arguments)


def _frozen(spec: ParamSpec, value: Any, scheme: str | None) -> Any:
    """A parameter under adapters, without values: `adapt` quantises the matrices, not the table."""
    if scheme is None or not spec.matrix:
        return value
    axis, parts = input_axis(spec), {}
    for name, (shape, dtype) in spec_parts(spec, scheme).items():
        place = place_beside(value, shape, by_rows=axis == -2)
        parts[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    held = parts[""], parts[".scale"], parts.get(".zero")
    return Quantized(*held, scheme, axis, value.dtype.name, integer=False)


def compile_step(
    config: Config, mesh: Mesh, rows: int, length: int, **options: Any
) -> CompiledStep:
    """Compiles the step of `lower_step`, whose arguments it takes."""
    begin = time.perf_counter()
    program = lower_step(config, mesh, rows, length, **options).compile()
    seconds = time.perf_counter() - begin
    memory: Any = program.memory_analysis()
    made_anew = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledStep(
        device=mesh.devices.flat[0].device_kind,
        mesh=sizes_of(mesh),
        seconds=seconds,
        held=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes + made_anew,
        sent=sent_bytes(program.as_text() or ""),
    )
