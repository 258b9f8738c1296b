"""`recurrentgemma inspect`: what a model is, from its config and the headers of its files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recurrentgemma.cli.model_options import EmbeddingScale, SoftCap, Window, overrides
from recurrentgemma.common.presets import Preset, member

if TYPE_CHECKING:
    from recurrentgemma.common.config import GriffinConfig
    from recurrentgemma.common.layer_spec import ParamSpec

_VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def inspect(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Folder, file or archive of any format. Default: the bundled model.",
            show_default=False,
        ),
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
    attention_window_size: Window = None,
    logits_soft_cap: SoftCap = None,
    embeddings_scale_by_sqrt_dim: EmbeddingScale = None,
) -> None:
    """Show what a model is: its config, parameters and sizes.

    No weights are read. Only Kaggle's formats need a framework, to read what is in them.
    """
    from recurrentgemma.cli.tables import render
    from recurrentgemma.common.checkpoint import BUNDLED
    from recurrentgemma.common.config import GriffinConfig
    from recurrentgemma.common.tensor_files import DTYPE_NAMES
    from recurrentgemma_conversion import open_checkpoint

    said = overrides(None, embeddings_scale_by_sqrt_dim, attention_window_size, logits_soft_cap)
    if preset is None:
        with open_checkpoint(checkpoint, said) as opened:
            source = {"checkpoint": str(checkpoint or BUNDLED), "format": str(opened.format)}
            dtypes = {path: DTYPE_NAMES[dtype] for path, dtype in opened.dtypes.items()}
            report = describe(opened.config, dtypes)
            report["bytes"]["parameters"]["stored"] = opened.stored_bytes
    elif checkpoint is None:
        known = member(Preset, preset.upper())
        source = {"preset": known.name}
        report = describe(GriffinConfig.from_preset(known), {})
    else:
        raise ValueError("give either a checkpoint or --preset, not both")
    if as_json:
        typer.echo(json.dumps(source | report))
    else:
        title = typer.style(next(iter(source.values())), bold=True)
        typer.echo("\n".join([title, "", *render(report, every_block=every_block)]))


def describe(config: GriffinConfig, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """A model's config, counts, sizes and parameters, as JSON values.

    Args:
      config: What the model is.
      dtypes: safetensors' name of each parameter's dtype, by path; empty if none is stored.
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
                "dtype": dtypes.get(spec.path),
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
