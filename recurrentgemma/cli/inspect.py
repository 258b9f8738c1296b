"""`recurrentgemma inspect`: what a model is, from its config and the headers of its files."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recurrentgemma.cli.model_options import EmbeddingScale, SoftCap, Window, overrides
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.presets import Preset

if TYPE_CHECKING:
    from recurrentgemma.common.model.config import Config
    from recurrentgemma.common.model.params import ParamSpec


def inspect(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Folder, file or archive of any format, or a config.json alone. Default: the "
            "bundled model.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    named: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="The same, named as for other commands.", hidden=True),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="The published model that the checkpoint is, or what to show without one: "
            f"{', '.join(known.name for known in Preset)}.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    every_block: Annotated[
        bool, typer.Option("--all", help="List every block, not one of each kind.")
    ] = False,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Show the memory of quantised weights and of training, too."),
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Show how the model lies on a mesh, as fsdp=4,tensor=2, and what a device keeps.",
            metavar="AXIS=N,...",
            show_default=False,
        ),
    ] = None,
    traffic: Annotated[
        str | None,
        typer.Option(
            help="Show what a training step on such a batch sends between the devices of --mesh.",
            metavar="ROWS,TOKENS",
            show_default=False,
        ),
    ] = None,
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
    from recurrentgemma.common.io.checkpoint import BUNDLED
    from recurrentgemma.common.io.tensor_files import DTYPE_NAMES
    from recurrentgemma.common.model.families import config_from_preset
    from recurrentgemma_conversion import open_checkpoint
    from recurrentgemma_conversion.opening import open_config

    shown = {"memory": memory, "mesh": None if mesh is None else named_mesh(mesh)}
    shown["batch"] = None if traffic is None else named_batch(traffic, mesh)
    checkpoint = checkpoint or named
    said = overrides(preset, embeddings_scale_by_sqrt_dim, attention_window_size, logits_soft_cap)
    if checkpoint is not None and checkpoint.suffix == ".json":
        source, config = {"file": str(checkpoint)}, open_config(checkpoint)
        report = described(config.overridden(**said.fields), {}, **shown)
    elif said.preset is not None and checkpoint is None:
        source, config = {"preset": said.preset.name}, config_from_preset(said.preset)
        report = described(config.overridden(**said.fields), {}, **shown)
    else:
        with open_checkpoint(checkpoint, said) as opened:
            source = {"checkpoint": str(checkpoint or BUNDLED), "format": str(opened.format)}
            dtypes = {path: DTYPE_NAMES[dtype] for path, dtype in opened.dtypes.items()}
            for spec in opened.specs:
                dtypes[spec.path] = opened.stored_in(spec) or dtypes[spec.path]
            report = described(opened.config, dtypes, **shown)
            report["quantization"] = opened.scheme
            report["bytes"]["parameters"]["stored"] = opened.stored_bytes
            report["tokenizer"] = opened.tokenizer and opened.named(opened.tokenizer)
    if as_json:
        typer.echo(json.dumps(source | report))
    else:
        title = typer.style(next(iter(source.values())), bold=True)
        typer.echo("\n".join([title, "", *render(report, every_block=every_block)]))


def named_mesh(text: str) -> dict[str, int]:
    """The mesh that a text names, with sizes for all axes, whatever devices there are.

    Raises:
      ValueError: A size is missing or -1, or the text names no mesh.
    """
    from recurrentgemma.common.errors import UserError
    from recurrentgemma.common.sharding import parse_mesh

    if "-1" in text or any("=" not in part for part in text.split(",")):
        raise UserError(f"--mesh needs the size of every axis here, as fsdp=4, got {text!r}")
    return parse_mesh(text, 1 << 62)


def named_batch(text: str, mesh: str | None) -> tuple[int, int]:
    """Rows and tokens of a batch; `ValueError` for another text, or where there is no mesh."""
    from recurrentgemma.common.errors import UserError

    words = text.split(",")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words) or mesh is None:
        raise UserError(f"--traffic needs ROWS,TOKENS and --mesh, got {text!r} and {mesh!r}")
    return int(words[0]), int(words[1])


def described(
    config: Config,
    dtypes: Mapping[str, str],
    *,
    memory: bool = False,
    mesh: Mapping[str, int] | None = None,
    batch: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A model's config, counts, sizes and parameters, as JSON values.

    Args:
      config: What the model is.
      dtypes: safetensors' name of each parameter's dtype, or its scheme, by path; empty if none is
        stored.
      memory: Whether to say what training takes, too.
      mesh: The mesh that it lies on, if any; training is then what each device keeps of it.
      batch: Rows and tokens of a batch, to say what a training step on the mesh sends.

    Raises:
      ValueError: The mesh does not fit the model.
    """
    from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
    from recurrentgemma.common.model.memory import (
        VALUE_BYTES,
        parameter_bytes,
        state_bytes,
        training_table,
    )
    from recurrentgemma.common.quantization import SCHEMES
    from recurrentgemma.common.sharding import device_values, layout
    from recurrentgemma.common.traffic import traffic

    specs = layer_spec(config)
    total = num_parameters(config)
    counts = Counter[str]()
    for spec in specs:
        counts[_part(spec, config)] += spec.size
    sizes: dict[str, Any] = {
        "parameters": {dtype: parameter_bytes(config, dtype) for dtype in VALUE_BYTES},
        "state_per_sequence": {dtype: state_bytes(config, dtype) for dtype in VALUE_BYTES},
    }
    if memory:
        for scheme in SCHEMES:
            with contextlib.suppress(UserError):  # it does not fit the model
                sizes[f"parameters {scheme}"] = {
                    dtype: parameter_bytes(config, dtype, scheme) for dtype in VALUE_BYTES
                }
        sizes["training"] = {
            dtype: {
                method: {**size._asdict(), "total": size.total}
                for method, size in training_table(config, dtype, mesh).items()
            }
            for dtype in VALUE_BYTES
        }
    splits = {} if mesh is None else layout(config, mesh)
    if mesh is not None:
        kept = device_values(config, mesh)
        sizes["parameters_a_device"] = {dtype: size * kept for dtype, size in VALUE_BYTES.items()}
    sent = {}
    if mesh is not None and batch is not None:
        sent = {
            dtype: {"all": found.sent, **found.collectives}
            for dtype in VALUE_BYTES
            for found in (traffic(config, mesh, *batch, dtype),)
        }
    return {
        "config": config.to_dict(),
        "num_parameters": {**counts, "total": total},
        "bytes": sizes | ({"sent_a_step": sent} if sent else {}),
        "parameters": [
            {
                "path": spec.path,
                "shape": list(spec.shape),
                "axes": list(spec.axes),
                "dtype": dtypes.get(spec.path),
                "count": spec.size,
                **_placed(spec, splits.get(spec.path), mesh),
            }
            for spec in specs
        ],
    }


def _placed(spec: ParamSpec, split: Any, mesh: Mapping[str, int] | None) -> dict[str, Any]:
    """How a parameter lies on a mesh, if there is one."""
    from recurrentgemma.common.sharding import share

    if mesh is None:
        return {}
    return {"split": list(split), "device_count": spec.size // share(split, mesh)}


def _part(spec: ParamSpec, config: Config) -> str:
    """The part of the model that a parameter is counted with."""
    first, *rest = spec.path.split(".")
    if first == "blocks":
        return f"{config.model.layers[int(rest[0])].mixer.kind}_blocks"
    return "embedding" if first == "embedder" else first
