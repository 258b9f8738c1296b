"""`recurrentgemma convert`: a checkpoint of any format into another."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recurrentgemma.cli.frameworks import DType, Scheme, choices
from recurrentgemma.cli.model_options import EmbeddingScale, PresetName, SoftCap, Window, overrides
from recurrentgemma.common.errors import UserError

if TYPE_CHECKING:
    from recurrentgemma_conversion import Progress, Summary

FORMATS = ("kaggle-flax", "kaggle-torch", "huggingface", "recurrentgemma")
_WINDOW = "Windows of huggingface"  # a panel of options
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A folder, file or archive of any format.", show_default=False),
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(
            help="The format to write. With --quantize it may be left out: recurrentgemma.",
            metavar=choices(FORMATS),
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Cast to this dtype, to nearest, ties to even. Default: no cast, but bfloat16 for "
            "quantised tensors of a GGUF.",
            metavar=choices(DType),
        ),
    ] = None,
    quantize: Annotated[
        Scheme | None,
        typer.Option(
            help="Store matrices in 8 bits, or in 4 in groups of 128 or of 32 inputs: in "
            "recurrentgemma, or in huggingface as compressed-tensors.",
            metavar=choices(Scheme),
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(help="Largest safetensors file, such as 500MB or 2GiB.", metavar="SIZE")
    ] = "5GB",
    ocdbt: Annotated[
        bool,
        typer.Option("--ocdbt", help="Write kaggle-flax as a database, not a file for each array."),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.model or tokenizer.json, where none is beside the weights.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    preset: PresetName = None,
    attention_window_size: Window = None,
    logits_soft_cap: SoftCap = None,
    embeddings_scale_by_sqrt_dim: EmbeddingScale = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a checkpoint with more than a text model.")
    ] = False,
    window_as_published: Annotated[
        bool,
        typer.Option(
            "--window-as-published",
            rich_help_panel=_WINDOW,
            help="To huggingface: state the window W; transformers then sees one key fewer.",
        ),
    ] = False,
    trained_in_transformers: Annotated[
        bool,
        typer.Option(
            "--trained-in-transformers",
            rich_help_panel=_WINDOW,
            help="From huggingface: the window counts the query's own key.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at the destination.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Read the result again and compare every bit."),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line.")
    ] = False,
) -> None:
    """Convert a checkpoint to another format, bit for bit, or quantise it.

    The formats: kaggle-flax (Orbax directory), kaggle-torch (.pt file), huggingface (for
    transformers), recurrentgemma (ours). The format of the source is recognised. The result appears
    whole and verified, or not at all.
    """
    from recurrentgemma_conversion import convert as run

    to = "recurrentgemma" if to is None and quantize else to
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to or 'none'}")
    if not force and (destination.exists() or destination.is_symlink()):
        raise UserError(f"{destination} exists; pass --force to replace it")
    with _progress() as progress:
        summary = run(
            source,
            destination,
            to,
            dtype=dtype,
            quantize=quantize,
            shard_size=parse_size(shard_size),
            ocdbt=ocdbt,
            tokenizer=tokenizer,
            overrides=overrides(
                preset, embeddings_scale_by_sqrt_dim, attention_window_size, logits_soft_cap
            )._replace(trained_in_transformers=trained_in_transformers),
            allow_nonfinite=allow_nonfinite,
            strict=strict,
            window_as_published=window_as_published,
            force=force,
            verify=verify,
            progress=progress,
        )
    sys.stderr.write("".join(f"{note}\n" for note in summary.notes))
    if summary.left_out:
        parts = dict.fromkeys(".".join(re.split("[./]", n)[:2]) for n in summary.left_out)
        sys.stderr.write(
            f"left out {len(summary.left_out)} tensors of other parts: {', '.join(parts)}\n"
        )
    if as_json:
        paths = {"source": str(source), "destination": str(destination)}
        typer.echo(json.dumps(paths | summary._asdict()))
    else:
        typer.echo(_line(summary, destination))


def _line(summary: Summary, destination: Path) -> str:
    rate = summary.bytes / max(summary.seconds, 1e-9) / 1e6
    parts = [
        f"{destination}: {summary.source_format} to {summary.format}",
        f"{summary.tensors} tensors",
        f"{summary.bytes / 1e9:.3g} GB of {' and '.join(summary.dtypes)}",
        f"{summary.seconds:.1f} s ({rate:.0f} MB/s)",
        "verified" if summary.verified else "not verified",
    ]
    if summary.nonfinite:
        parts.append(f"NaN or infinity in {', '.join(summary.nonfinite)}")
    return ", ".join(parts)


def parse_size(text: str) -> int:
    """A number of bytes, with a unit or without: "5GB", "1.5 GiB", "1000".

    Raises:
      ValueError: The text is no size, or not positive.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([KMG]I?)?B?", text.strip().upper())
    try:
        size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"a size must be a number of bytes such as 500MB or 2GiB, got {text!r}")
    return size


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows tensors, bytes and rate as they come: on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def show(step: Progress) -> None:
            if step.phase not in tasks:
                name = {"write": "Writing", "verify": "Verifying"}[step.phase]
                tasks[step.phase] = bars.add_task(name, total=step.total_bytes, tensors="")
            bars.update(
                tasks[step.phase],
                completed=step.bytes,
                tensors=f"{step.tensors}/{step.total_tensors}",
            )

        yield show
