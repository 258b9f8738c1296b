"""`recurrentgemma merge`: trained adapters in a checkpoint's parameters, or in PEFT's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import DType, choices
from recurrentgemma.cli.model_options import EmbeddingScale, PresetName, SoftCap, Window, overrides
from recurrentgemma.common.errors import UserError

if TYPE_CHECKING:
    from recurrentgemma_conversion import Overrides


def merge(
    base: Annotated[
        Path,
        typer.Argument(help="The checkpoint that was fine-tuned, of any format."),
    ],
    adapters: Annotated[
        Path, typer.Argument(help="The adapter file, or the folder that a run left.")
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Dtype of the merged parameters. Default: the base's.",
            metavar=choices(DType),
        ),
    ] = None,
    peft: Annotated[
        bool,
        typer.Option("--peft", help="Do not merge: write the adapters in the layout of PEFT."),
    ] = False,
    preset: PresetName = None,
    attention_window_size: Window = None,
    logits_soft_cap: SoftCap = None,
    embeddings_scale_by_sqrt_dim: EmbeddingScale = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at the destination.")
    ] = False,
) -> None:
    """Merge trained adapters into their model: a checkpoint folder that needs no adapters.

    Adapters that were trained on a quantised base are merged into that base.
    """
    if not force and (destination.exists() or destination.is_symlink()):
        raise UserError(f"{destination} exists; pass --force to replace it")
    stated = overrides(preset, embeddings_scale_by_sqrt_dim, attention_window_size, logits_soft_cap)
    with working("Merging"):
        message = _merge(base, adapters, destination, dtype, peft, stated, force)
    typer.echo(message)


def _merge(
    base: Path,
    path: Path,
    destination: Path,
    dtype: DType | None,
    peft: bool,
    stated: Overrides,
    force: bool,
) -> str:
    import numpy as np

    from recurrentgemma.common.io.arrays import DTYPES
    from recurrentgemma.common.model.layer_spec import ParamSpec
    from recurrentgemma.common.training.adapters import read_adapters
    from recurrentgemma.common.training.lora import lora_targets
    from recurrentgemma.common.training.lora import merge as merged
    from recurrentgemma_conversion.opening import open_checkpoint
    from recurrentgemma_conversion.peft import write_peft
    from recurrentgemma_conversion.readers.native import save_folder

    with open_checkpoint(base, stated) as checkpoint:
        adapters = read_adapters(path, checkpoint.config)
        options = adapters.options
        count = len(lora_targets(checkpoint.config, options))
        what = f"{count} adapters of rank {options.rank}"
        if peft:
            write_peft(destination, adapters, force=force)
            return f"{destination}: {what} in PEFT's layout"

        def parameter(spec: ParamSpec) -> np.ndarray:
            return merged(spec, checkpoint.read(spec), adapters.arrays, options)

        dtypes = {p: d if dtype is None else DTYPES[dtype] for p, d in checkpoint.dtypes.items()}
        tokenizer = checkpoint.load_tokenizer()
        save_folder(destination, checkpoint.config, dtypes, parameter, tokenizer, force=force)
    return f"{destination}: {what} merged"
