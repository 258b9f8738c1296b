"""`recurrentgemma download`: a published checkpoint from Kaggle or Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from recurrentgemma.common.errors import UserError


def download(
    source: Annotated[
        str,
        typer.Argument(
            help="kaggle:google/recurrentgemma/flax/2b-it, hf:google/gemma-3-270m-it, and so on.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(
            help="The folder to make. Default: named for the model.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at the destination.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line.")
    ] = False,
) -> None:
    """Download a published checkpoint, for sample, convert and inspect."""
    from recurrentgemma_conversion.download import default_folder
    from recurrentgemma_conversion.download import download as run

    folder = destination or default_folder(source)
    if not force and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{folder} exists; pass --force to replace it")
    format_, _ = run(source, folder, force=force)
    if as_json:
        typer.echo(json.dumps({"source": source, "destination": str(folder), "format": format_}))
    else:
        typer.echo(f"{folder}: {format_ or 'an archive'} from {source}")
