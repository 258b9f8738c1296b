"""`recurrentgemma train --compile-only`: what a training step takes on TPUs that are not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.tables import size_text
from recurrentgemma.common.errors import UserError

if TYPE_CHECKING:
    from recurrentgemma.cli.train_options import TrainOptions
    from recurrentgemma.common.model.config import Config

_MESH = "fsdp=-1"


def compile_only(topology: str, options: TrainOptions, *, as_json: bool) -> None:
    """Compiles the step of these options for a topology, and prints what it takes.

    Raises:
      ValueError: The framework is PyTorch, or the step does not fit the topology.
      MissingExtraError: JAX or `libtpu` is not installed.
    """
    from recurrentgemma.cli.train_inputs import make_setup, read_config
    from recurrentgemma.cli.train_options import require_consistent
    from recurrentgemma.common.extras import require
    from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
    from recurrentgemma.common.twin import PACKAGES

    if options.framework not in (None, "jax"):
        raise UserError(f"--compile-only compiles with JAX, got --framework {options.framework}")
    require(*PACKAGES["jax"])
    import jax

    from recurrentgemma.jax.runtime.ahead_of_time import compile_step, tpu_devices
    from recurrentgemma.jax.sharding import make_mesh

    require_consistent(options)
    tokenizer, preset = load_tokenizer(options.tokenizer), options.preset
    config = read_config(options, None if options.tokenizer is None else tokenizer.size)
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the TPUs themselves
    devices = tpu_devices(topology)
    options = dataclasses.replace(options, dtype=options.dtype or "bfloat16")
    setup = make_setup(options, config, tokenizer, options.steps or 1)
    with working(f"Compiling for {topology}"):
        step = compile_step(
            config,
            make_mesh(options.mesh or _MESH, devices),
            options.batch_size,
            options.length,
            optimizer=setup.optimizer,
            lora=setup.lora,
            dtype=setup.dtype,
            state_dtype=setup.state_dtype,
            accumulation=options.accumulation,
            gradient_checkpointing=setup.gradient_checkpointing,
        )
    name = preset.upper() if preset else str(options.config or options.checkpoint or BUNDLED)
    report = {"model": name, "topology": topology, **step._asdict()}
    if setup.lora is None:
        report |= {"computed": _computed(config, step.mesh, options)}
    typer.echo(json.dumps(report) if as_json else "\n".join(_lines(report)))


def _computed(config: Config, mesh: Mapping[str, int], options: TrainOptions) -> dict[str, int]:
    """What `inspect` says that a step sends."""
    from recurrentgemma.common.traffic import traffic

    dtype = "float32" if options.dtype == "float32" else "bfloat16"
    found = traffic(config, mesh, options.batch_size, options.length, dtype)
    return {kind: options.accumulation * size for kind, size in found.collectives.items()}


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    from recurrentgemma.common.sharding import mesh_text

    held, temporary = report["held"], report["temporary"]
    yield typer.style(report["model"], bold=True)
    yield f"{report['topology']}: {report['device']}, {mesh_text(report['mesh'])}"
    yield f"compiled in {report['seconds']:.0f} s"
    yield (
        f"a chip: {size_text(held + temporary)}, which are {size_text(held)} of state and batch "
        f"and {size_text(temporary)} beside them"
    )
    sent, computed = report["sent"], report.get("computed", {})
    for kind in dict.fromkeys([*sent, *computed]):
        beside = f" (inspect: {size_text(computed.get(kind, 0))})" if computed else ""
        yield f"a chip sends, {kind}: {size_text(sent.get(kind, 0))}{beside}"
    beside = f" (inspect: {size_text(sum(computed.values()))})" if computed else ""
    yield f"a chip sends, together: {size_text(sum(sent.values()))}{beside}"
