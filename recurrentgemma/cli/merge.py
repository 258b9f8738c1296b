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
        Path,
        typer.Argument(help="The adapter file, the folder that a run left, or a folder of PEFT's."),
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Dtype of the merged parameters. Default: the base's, or bfloat16 if that is "
            "quantised.",
            metavar=choices(DType),
        ),
    ] = None,
    peft: Annotated[
        bool,
        typer.Option("--peft", help="Do not merge: write the adapters in the layout of PEFT."),
    ] = False,
    base_name: Annotated[
        str | None,
        typer.Option(
            help="With --peft: the folder, or the name on the hub, under which transformers finds "
            "the base. Default: BASE.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    preset: PresetName = None,
    attention_window_size: Window = None,
    logits_soft_cap: SoftCap = None,
    embeddings_scale_by_sqrt_dim: EmbeddingScale = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at the destination.")
    ] = False,
) -> None:
    """Merge trained adapters into their model: a checkpoint folder that needs no adapters.

    Adapters that were trained on a quantised base are merged into that base. A quantised checkpoint
    becomes a bfloat16 one, since rounding the sum to 8 bits would lose small changes.
    """
    if not force and (destination.exists() or destination.is_symlink()):
        raise UserError(f"{destination} exists; pass --force to replace it")
    if base_name is not None and not peft:
        raise UserError("--base-name goes with --peft")
    stated = overrides(preset, embeddings_scale_by_sqrt_dim, attention_window_size, logits_soft_cap)
    with working("Merging"):
        message = _merge(base, adapters, destination, dtype, peft, base_name, stated, force)
    typer.echo(message)


def _merge(
    base: Path,
    path: Path,
    destination: Path,
    dtype: DType | None,
    peft: bool,
    base_name: str | None,
    stated: Overrides,
    force: bool,
) -> str:
    from recurrentgemma.common.io.arrays import DTYPES
    from recurrentgemma.common.training.lora import lora_targets
    from recurrentgemma_conversion.formats import Format
    from recurrentgemma_conversion.opening import open_checkpoint
    from recurrentgemma_conversion.peft import hub_name, write_peft
    from recurrentgemma_conversion.readers.native import save_folder

    with open_checkpoint(base, stated, adapter=path) as checkpoint:
        adapters = checkpoint.adapters
        assert adapters is not None
        count = len(lora_targets(checkpoint.config, adapters.options))
        what = f"{count} adapters of rank {adapters.options.rank}"
        if peft:
            where = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
            name = base_name or hub_name(where) or str(where.absolute())
            write_peft(destination, adapters, name, force=force)
            note = ""
            if base_name is None and checkpoint.format is not Format.HUGGINGFACE:
                note = (
                    f"; {base} is no checkpoint of transformers: convert it with --to huggingface "
                    "and name the result with --base-name"
                )
            return f"{destination}: {what} in PEFT's layout, for {name}{note}"
        note = ""
        if checkpoint.scheme is not None:
            dtype = dtype or DType.BFLOAT16
            note = (
                f", as {dtype}: rounding back to {checkpoint.scheme} would lose part of what was "
                "learned (convert --quantize does it)"
            )
        dtypes = {p: d if dtype is None else DTYPES[dtype] for p, d in checkpoint.dtypes.items()}
        tokenizer = checkpoint.load_tokenizer()
        save_folder(destination, checkpoint.config, dtypes, checkpoint.read, tokenizer, force=force)
    return f"{destination}: {what} merged{note}"
