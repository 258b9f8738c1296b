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
    console.print("\n".join(_legend(batch, report.dtype, levels)) + "\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", no_wrap=True, overflow="ellipsis")
    for name in ("max", "RMS", "ulps", *levels):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, lines in groupby(_lines(report.rows, every), lambda line: line[1].kind):
        if kind != "activation":
            table.add_row("")
        for name, row in lines:
            error = row.error
            cells = (
                _power(error.largest),
                _power(error.rms),
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
        f"KL divergence {_power(report.kl_divergence)} nats"
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


def _legend(batch: ParityBatch, dtype: str, levels: Sequence[str]) -> Iterable[str]:
    """The lines above the table: what was read, and what the columns mean."""
    from recurrentgemma.parity.budget import FLOAT64_LIMIT, MARGIN

    rows, length = batch.tokens.shape
    chunks = " + ".join(str(n) for n in batch.chunks if n > 1)
    yield f"Both read the same {rows} rows of {length} tokens: in one pass, in chunks ({chunks}),"
    yield f"and the last {batch.num_steps} step by step. Each line is the worst of these."
    yield ""
    yield "max, RMS  the largest difference and the root mean square of all differences,"
    yield "          as parts of the RMS of the tensor's own values"
    yield f"ulps      the largest difference in units of {dtype}'s last digit"
    for level in levels:
        limit = (
            f"{FLOAT64_LIMIT:g} of the largest value"
            if level == "float64"
            else f"{MARGIN:g} times the rounding error"
        )
        yield f"{level:9} the part of what is allowed in {level}: {limit}"
    yield "Above 100% the two are not the same model."


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


def _power(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _short(value: float) -> str:
    if not value:
        return "0"
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}"


def _percent(share: float) -> str:
    if 0 < share < 0.01:
        return "<1%"
    if math.isinf(share):
        return "inf"
    return f"{share:.0%}" if share < 100 else f"{100 * share:.0e}%"
