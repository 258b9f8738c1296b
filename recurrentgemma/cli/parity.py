"""`recurrentgemma parity`: checks that two frameworks, or two checkpoints, are one model."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import Adapter, Quantize, choices
from recurrentgemma.cli.model_options import EmbeddingScale, PresetName, SoftCap, Window, overrides
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.io.text import text_of

if TYPE_CHECKING:
    from recurrentgemma.common.tokenizer import Tokenizer


class Implementation(enum.StrEnum):
    """The implementation that runs a model."""

    JAX = "jax"
    TORCH = "torch"
    TRANSFORMERS = "transformers"


class ParityDType(enum.StrEnum):
    """The dtype of parameters and computation."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


BEYOND_BUDGET = 1
_SIDES, _TOKENS, _REPORT = "The two sides", "What they read", "Report"


def parity(
    one: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint of any format. Default: the bundled model.",
            metavar="A",
            show_default=False,
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Argument(
            help="Another checkpoint with the same config. Default: A.",
            metavar="B",
            show_default=False,
        ),
    ] = None,
    framework: Annotated[
        Implementation,
        typer.Option(
            help="The implementation that runs A.",
            metavar=choices(Implementation),
            rich_help_panel=_SIDES,
        ),
    ] = Implementation.JAX,
    against: Annotated[
        Implementation,
        typer.Option(
            help="The implementation that runs B.",
            metavar=choices(Implementation),
            rich_help_panel=_SIDES,
        ),
    ] = Implementation.TORCH,
    dtype: Annotated[
        ParityDType,
        typer.Option(
            help="Dtype of parameters and computation.",
            metavar=choices(ParityDType),
            rich_help_panel=_SIDES,
        ),
    ] = ParityDType.FLOAT32,
    as_stored: Annotated[
        bool,
        typer.Option(
            "--as-stored",
            help="Let transformers read B by itself, a huggingface folder, as its config says.",
            rich_help_panel=_SIDES,
        ),
    ] = False,
    adapter: Adapter = None,
    quantize: Quantize = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Read a UTF-8 text instead of random tokens.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of random tokens.", metavar="N", rich_help_panel=_TOKENS),
    ] = 0,
    length: Annotated[
        int | None,
        typer.Option(
            min=12,
            help="Tokens a row. Default: 64 more than the attention window, at most 512.",
            metavar="N",
            show_default=False,
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    greedy: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens to continue each row with.",
            metavar="N",
            rich_help_panel=_TOKENS,
        ),
    ] = 32,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Compare every parameter's gradient, too.",
            rich_help_panel=_REPORT,
        ),
    ] = False,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="List every tensor, inside of blocks too.", rich_help_panel=_REPORT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object, with every tensor.", rich_help_panel=_REPORT
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the error by depth.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    preset: PresetName = None,
    attention_window_size: Window = None,
    logits_soft_cap: SoftCap = None,
    embeddings_scale_by_sqrt_dim: EmbeddingScale = None,
) -> None:
    """Prove that two frameworks, or two checkpoints, are one model.

    Compares activations, logits, states and gradients. Differences must stay within a budget that
    is measured from the dtype's rounding, and within 1e-10 in float64. Exits with 0 if all do, or
    else with 1. Adapters go to A, and to B unless you name a B. With --quantize the stored bytes
    and the int32 sums of products must be equal to the bit, in both twins and in NumPy.
    """
    from recurrentgemma.cli.parity_table import render, title_of
    from recurrentgemma.common.io.checkpoint import BUNDLED
    from recurrentgemma.common.twin import find_twin
    from recurrentgemma.parity import compare, default_length, load_model, make_batch
    from recurrentgemma.parity.models import require_installed
    from recurrentgemma.parity.plot import check_plot
    from recurrentgemma.parity.plot import plot as draw
    from recurrentgemma.parity.quantized import compare_quantized
    from recurrentgemma.parity.report import require_same_config
    from recurrentgemma_conversion import open_checkpoint
    from recurrentgemma_conversion.names import family_of

    if framework is Implementation.TRANSFORMERS:
        raise UserError("--framework must be jax or torch, got transformers: use --against")
    if against is Implementation.TRANSFORMERS and dtype is ParityDType.FLOAT64:
        raise UserError(
            "--against transformers takes float32 and bfloat16, since its recurrence is float32, "
            f"got {dtype}"
        )
    if as_stored and against is not Implementation.TRANSFORMERS:
        raise UserError(f"--as-stored goes with --against transformers, got {against}")
    if as_stored and adapter is not None and other is None:
        raise UserError("--adapter is added to what recurrentgemma reads, not to --as-stored")
    if quantize is not None and (gradients or against is Implementation.TRANSFORMERS):
        raise UserError(
            "--quantize compares the twins' outputs: not with transformers, --gradients"
        )
    for implementation in (framework, against):
        require_installed(implementation)
    if plot is not None:
        check_plot(plot)
    paths = one or BUNDLED, other or one or BUNDLED
    adapters = adapter, adapter if other is None else None
    said = overrides(preset, embeddings_scale_by_sqrt_dim, attention_window_size, logits_soft_cap)
    configs, tokenizers = [], []
    for path in paths:
        with open_checkpoint(path, said) as opened:
            configs.append(opened.config)
            tokenizers.append(opened.load_tokenizer() if text is not None else None)
    require_same_config((str(paths[0]), str(paths[1])), configs[0], configs[1])
    batch = make_batch(
        configs[0],
        length or default_length(configs[0]),
        seed=seed,
        text=None if text is None else _tokens(expanded(text), tokenizers[0]),
        plain=against is Implementation.TRANSFORMERS,
    )
    with working("Comparing"):
        report = compare(
            lambda: load_model(framework, paths[0], dtype, said, False, adapters[0], quantize),
            lambda: load_model(against, paths[1], dtype, said, as_stored, adapters[1], quantize),
            batch,
            dtype,
            gradients=gradients,
            num_greedy=greedy,
            inside=every,
        )
        differences = None
        if quantize is not None:
            twins = [find_twin(framework), find_twin(against)]
            held = [
                twin.quantized(
                    twin.load(path, dtype, overrides=said, adapter=added, quantize=quantize)
                )
                for twin, path, added in zip(twins, paths, adapters, strict=True)
            ]
            differences = compare_quantized(twins, held, seed)
    sides = tuple(
        f"{path.resolve().name}{' with adapters' if added else ''} in {implementation}"
        for path, added, implementation in zip(paths, adapters, (framework, against), strict=True)
    )
    title = title_of(sides, report.dtype)
    family = family_of(configs[1]) if against is Implementation.TRANSFORMERS else None
    notes = [] if family is None or as_stored else list(family.fields_note(configs[1]))
    if plot is not None:
        draw(report, title, plot)
    if as_json:
        ends = {
            "one": _end(paths[0], adapters[0], framework),
            "other": _end(paths[1], adapters[1], against),
            "rows": len(batch.tokens),
            "length": batch.tokens.shape[1],
            "chunks": list(batch.chunks),
            "notes": notes,
        }
        if differences is not None:
            ends["quantized"] = {"scheme": quantize, **differences._asdict()}
        typer.echo(json.dumps(ends | report.to_dict()))
    else:
        render(report, title, batch, notes, every=every)
        if differences is not None:
            typer.echo(f"{quantize}: {differences}")
    if not report.within or not (differences is None or differences.equal):
        raise typer.Exit(BEYOND_BUDGET)


def _end(path: Path, adapter: Path | None, implementation: Implementation) -> dict[str, str]:
    """One side of a comparison as JSON values."""
    added = {} if adapter is None else {"adapter": str(adapter)}
    return {"checkpoint": str(path), **added, "implementation": implementation}


def _tokens(file: Path, tokenizer: Tokenizer | None) -> list[int]:
    text = text_of(file.read_bytes(), str(file))
    assert tokenizer is not None
    return tokenizer.encode(text)
