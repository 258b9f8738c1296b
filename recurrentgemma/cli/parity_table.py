"""The report of `recurrentgemma parity` as text: at most 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recurrentgemma.parity import ParityBatch, Report, Row


def title_of(sides: Sequence[str], dtype: str) -> str:
    """A line that names the two sides."""
    return f"{sides[0]} against {sides[1]}, {dtype}"


def render(
    report: Report, title: str, batch: ParityBatch, notes: Sequence[str] = (), *, every: bool
) -> None:
    """Prints a report.

    Args:
      report: The report.
      title: The first line.
      batch: The tokens of the comparison.
      notes: What else to say of the models, a line each.
      every: Whether to list every tensor; otherwise each block has one line for its worst state and
        one for its worst gradient.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(title)}[/]")
    for note in notes:
        console.print(escape(note))
    levels = list(dict.fromkeys([report.dtype, report.wide]))
    rows, length = batch.tokens.shape
    chunks = " + ".join(str(n) for n in batch.chunks if n > 1)
    console.print(
        f"{rows} rows of {length} tokens: in one pass, in chunks ({chunks}), "
        f"and {batch.num_steps} step by step.\n"
        "Differences are relative to a tensor's RMS. A dtype's column shows the part that\n"
        f"they take of their budget in it, which is {_budgets(levels)}.\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worst of all passes", no_wrap=True, overflow="ellipsis")
    for name in ("max", "RMS", "ulps", *levels):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, lines in groupby(_lines(report.rows, every), lambda line: line[1].kind):
        if kind != "activation":
            table.add_row("")
        for name, row in lines:
            error = row.error
            cells = (
                f"{error.largest:.1e}",
                f"{error.rms:.1e}",
                _short(error.ulps(report.dtype)),
                *(_percent(e.share) for e in (error, row.wide)[: len(levels)]),
            )
            style = None if row.within else "red"
            table.add_row(escape(name if row.within else f"{name}  BEYOND"), *cells, style=style)
    console.print(table)
    console.print()
    for line in summary(report):
        console.print(line)


def summary(report: Report) -> Iterable[str]:
    """The lines below the table."""
    params = [row for row in report.rows if row.kind == "parameter"]
    differing = [row for row in params if not row.within]
    if differing:
        yield f"{len(differing)} of {len(params)} parameters differ, first {differing[0].name}"
    else:
        yield f"all {len(params)} parameters are the same"
    for row in report.rows:
        if row.dtypes[0] != row.dtypes[1]:
            yield f"{row.name} is {row.dtypes[0]} in the first and {row.dtypes[1]} in the second"
            break
    yield (
        f"same most likely token at {report.argmax_agreement:.2%} of places; "
        f"KL divergence {report.kl_divergence:.1e} nats"
    )
    if report.num_greedy:
        agreed = report.greedy_agreement
        yield (
            f"greedy continuations agree for {min(agreed)} to {max(agreed)} of "
            f"{report.num_greedy} tokens"
        )
    first = report.first_beyond
    if first is None:
        yield "[bold green]within the budget[/]"
    else:
        where = f", {first.case}" if first.case else ""
        yield f"[bold red]beyond the budget, first in {first.name}{where}[/]"


def _budgets(levels: Sequence[str]) -> str:
    kinds = ("1e-10" if level == "float64" else "measured" for level in levels)
    return " and ".join(dict.fromkeys(kinds))


def _lines(rows: Sequence[Row], every: bool) -> Iterable[tuple[str, Row]]:
    """Each label with its worst row."""
    for kind in ("activation", "state", "gradient"):
        labels: dict[str, Row] = {}
        for row in rows:
            if row.kind == kind:
                label = row.name if every or kind == "activation" else _group(row)
                worst = labels.setdefault(label, row)
                if row.share > worst.share:
                    labels[label] = row
        yield from labels.items()


def _group(row: Row) -> str:
    parts = row.name.split(".")
    block = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
    return f"{row.kind} of {block}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}"


def _percent(share: float) -> str:
    if share == 0 or 0.01 <= share < 100:
        return f"{share:.0%}"
    return "inf" if math.isinf(share) else f"{100 * share:.0e}%"
