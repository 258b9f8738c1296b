"""Options that say how tokens are chosen and where a text ends."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from recurrentgemma.common.errors import UserError

if TYPE_CHECKING:
    from recurrentgemma.common.generation.strategies import Sampling

SEEDS = 2**32
_PANEL = "How tokens are chosen"
END = "Where the text ends"  # a panel of options, too

Temperature = Annotated[
    float | None,
    typer.Option(
        help="Draw from softmax(logits / T); 0 takes the likeliest token. "
        "Default: 0, or 1 beside --top-k, --top-p or --min-p.",
        metavar="T",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Draw from the K likeliest tokens.",
        metavar="K",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Draw from the fewest tokens that have probability P together.",
        metavar="P",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Draw from the tokens at least P times as likely as the likeliest.",
        metavar="P",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Above 1 makes tokens that are already in the text less likely.",
        metavar="R",
        rich_help_panel=_PANEL,
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        help="Above 0 makes tokens that were generated already less likely.",
        metavar="A",
        rich_help_panel=_PANEL,
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        help="The same, as often as each was generated.",
        metavar="A",
        rich_help_panel=_PANEL,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        help="Add B to the logit of a token id; may be repeated.",
        metavar="ID=B",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Same seed, same draws. Default: a fresh one, which is reported.",
        metavar="N",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="End the text before this string.",
        metavar="TEXT",
        show_default=False,
        rich_help_panel=END,
    ),
]
StopId = Annotated[
    list[int] | None,
    typer.Option(
        help="End the text at this token id.",
        metavar="ID",
        show_default=False,
        rich_help_panel=END,
    ),
]


def strategy(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int | None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Sequence[str] | None = None,
) -> tuple[Sampling, int | None]:
    """The strategy that the options ask for, and a seed: the given one, or a fresh one to draw."""
    from recurrentgemma.common.generation.strategies import Categorical, Greedy

    if seed is not None and not 0 <= seed < SEEDS:
        raise UserError(f"--seed must be at least 0 and below {SEEDS}, got {seed}")
    adjusted = {
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(map(_bias, logit_bias or ())),
    }
    # Made even if the strategy is greedy, so that a wrong value is always reported.
    categorical = Categorical(
        temperature or 1.0,
        top_k,
        1.0 if top_p is None else top_p,
        0.0 if min_p is None else min_p,
        repetition_penalty,
        **adjusted,
    )
    if temperature == 0 or {temperature, top_k, top_p, min_p} == {None}:
        return Greedy(repetition_penalty, **adjusted), seed
    return categorical, secrets.randbelow(SEEDS) if seed is None else seed


def _bias(text: str) -> tuple[int, float]:
    """The token and the number of a `--logit-bias`."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UserError(f"--logit-bias must be ID=B, such as 108=-5, got {text!r}") from None
