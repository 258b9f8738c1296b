"""`recurrentgemma inspect`: what a model is, from its config and the headers of its files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recurrentgemma.common.presets import Preset, member

if TYPE_CHECKING:
    from recurrentgemma.common.config import GriffinConfig
    from recurrentgemma.common.layer_spec import ParamSpec

_VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def inspect(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint folder. Default: the bundled model.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published model instead, without a checkpoint: "
            f"{', '.join(known.name for known in Preset)}.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    every_block: Annotated[
        bool, typer.Option("--all", help="List every block, not one of each kind.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every parameter.")
    ] = False,
) -> None:
    """Show what a model is: its config, parameters and sizes.

    No weights are read, and neither framework is needed.
    """
    from recurrentgemma.cli.tables import render
    from recurrentgemma.common.checkpoint import open_folder
    from recurrentgemma.common.config import GriffinConfig

    if preset is None:
        folder = open_folder(checkpoint)
        source = {"checkpoint": str(folder.path)}
        report = describe(folder.config, folder.dtypes)
        report["bytes"]["parameters"]["stored"] = folder.weights.stat().st_size
    elif checkpoint is None:
        known = member(Preset, preset.upper())
        source = {"preset": known.name}
        report = describe(GriffinConfig.from_preset(known), {})
    else:
        raise ValueError("give either a checkpoint or --preset, not both")
    if as_json:
        typer.echo(json.dumps(source | report))
    else:
        title = typer.style(" ".join(source.values()), bold=True)
        typer.echo("\n".join([title, "", *render(report, every_block=every_block)]))


def describe(config: GriffinConfig, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """A model's config, counts, sizes and parameters, as JSON values.

    Args:
      config: What the model is.
      dtypes: safetensors' name of each stored tensor's dtype; empty if none is stored.
    """
    from recurrentgemma.common.layer_spec import layer_spec, num_parameters

    specs = layer_spec(config)
    total = num_parameters(config)
    counts = Counter[str]()
    for spec in specs:
        counts[_part(spec, config)] += spec.size
    return {
        "config": config.to_dict(),
        "num_parameters": {**counts, "total": total},
        "bytes": {
            "parameters": {name: total * size for name, size in _VALUE_BYTES.items()},
            "state_per_sequence": {n: _state_bytes(config, s) for n, s in _VALUE_BYTES.items()},
        },
        "parameters": [
            {
                "path": spec.path,
                "shape": list(spec.shape),
                "axes": list(spec.axes),
                "dtype": dtypes.get(spec.torch.name),
                "count": spec.size,
            }
            for spec in specs
        ],
    }


def _part(spec: ParamSpec, config: GriffinConfig) -> str:
    """The part of the model that a parameter is counted with."""
    first, *rest = spec.path.split(".")
    if first == "blocks":
        return f"{config.block_types[int(rest[0])].value}_blocks"
    return "embedding" if first == "embedder" else first


def _state_bytes(config: GriffinConfig, value_bytes: int) -> int:
    """Bytes of one sequence's state, values of the computation taking `value_bytes`."""
    from recurrentgemma.common.state import state_shapes

    # These are float32 and int32 whatever the computation is.
    fixed = {"rg_lru_state": 4, "num_tokens": 4}
    return sum(
        math.prod(shape) * fixed.get(path.rsplit(".", 1)[1], value_bytes)
        for path, shape in state_shapes(config).items()
    )
