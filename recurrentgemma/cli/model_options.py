"""Options that say what a checkpoint does not say of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from recurrentgemma.common.model.presets import Preset, member

if TYPE_CHECKING:
    from recurrentgemma_conversion import Overrides

_PANEL = "What the checkpoint does not say of the model, or says otherwise"

PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help=f"The published model that this is: {', '.join(known.name for known in Preset)}.",
        metavar="NAME",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--attention-window-size",
        min=1,
        metavar="W",
        help="Tokens before it that a query sees, as published.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
SoftCap = Annotated[
    float | None,
    typer.Option(
        "--logits-soft-cap",
        min=0,
        metavar="C",
        help="Logits are C tanh(logits / C); 0 for none.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
EmbeddingScale = Annotated[
    bool | None,
    typer.Option(
        "--embeddings-scale-by-sqrt-dim/--no-embeddings-scale-by-sqrt-dim",
        help="Whether embeddings are multiplied by sqrt(width).",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


def overrides(
    preset: str | None,
    embeddings_scale_by_sqrt_dim: bool | None,
    attention_window_size: int | None,
    logits_soft_cap: float | None,
) -> Overrides:
    """The options together."""
    from recurrentgemma_conversion import Overrides

    return Overrides(
        None if preset is None else member(Preset, preset.upper()),
        embeddings_scale_by_sqrt_dim,
        attention_window_size,
        logits_soft_cap,
    )
