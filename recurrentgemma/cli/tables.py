"""The report of `recurrentgemma inspect` as text: at most 80 columns for any published model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

_Row = Sequence[str]
_LETTERS = 40  # in a line


def render(report: dict[str, Any], *, every_block: bool) -> Iterator[str]:
    """The lines of a report from `inspect.described`.

    Args:
      report: The report.
      every_block: Whether to list all blocks, or only the first of each kind.
    """
    rows = list(_config_rows(report["config"]))
    if "tokenizer" in report:
        path = report["tokenizer"]
        rows.append(("tokenizer", Path(path).name if path else "none beside the weights"))
    if report.get("quantization"):
        rows.append(("quantised", report["quantization"]))
    elif kept := sum(parameter["dtype"] == "q4_32" for parameter in report["parameters"]):
        rows.append(("quantised", f"{kept} matrices in Q4_0, which --quantize q4_32 keeps"))
    yield from _align(rows, right=())
    yield ""
    yield from _parameter_lines(report, every_block)
    yield ""
    counts = report["num_parameters"]
    yield from _align(
        [
            (name.replace("_", " "), f"{count:,}", f"{count / counts['total']:.1%}")
            for name, count in counts.items()
        ],
        right=(1, 2),
    )
    yield ""
    sizes = dict(report["bytes"])
    training, sent = sizes.pop("training", {}), sizes.pop("sent_a_step", {})
    columns = list(sizes["parameters"])  # the state has no stored size
    rows = [
        (_label(name), *(size_text(row.get(column)) for column in columns))
        for name, row in sizes.items()
    ]
    header, *lines = _align([("size", *columns), *rows], right=range(1, 4))
    yield from (_bold(header), *lines)
    if sent:
        kinds = list(next(iter(sent.values())))
        rows = [(dtype, *map(size_text, row.values())) for dtype, row in sent.items()]
        header, *lines = _align([("a device sends, a step", *kinds), *rows], right=range(1, 7))
        yield from ("", _bold(header), *lines)
    for dtype, methods in training.items():
        yield ""
        columns = list(next(iter(methods.values())))
        rows = [(method, *map(size_text, row.values())) for method, row in methods.items()]
        header, *lines = _align([(f"training, {dtype}", *columns), *rows], right=range(1, 6))
        yield from (_bold(header), *lines)


def _config_rows(config: dict[str, Any]) -> Iterator[_Row]:
    for name, value in config.items():
        if isinstance(value, list) and all(isinstance(kind, str) for kind in value):
            kinds = Counter(value).items()
            kinds = ", ".join(f"{n} {kind} ({kind[0].upper()})" for kind, n in kinds)
            yield "layers", f"{len(value)}: {kinds}"
            yield name, _word("".join(kind[0].upper() for kind in value))
        else:
            yield name, str(value)


def _word(letters: str) -> str:
    """The letters; of many, the pattern that is repeated and cut off."""
    if len(letters) <= _LETTERS:
        return letters
    lengths = range(1, len(letters) + 1)
    period = next(n for n in lengths if letters[n:] == letters[: len(letters) - n])
    return f"{letters[:period]} repeated"


def _parameter_lines(report: dict[str, Any], every_block: bool) -> Iterator[str]:
    """The table of parameters: headings, and rows with one alignment."""
    entries = list(_entries(report, every_block))
    split = "split" in report["parameters"][0]
    header = ["parameter", "shape", "split" if split else "axes", "dtype"]
    header.append("a device" if split else "count")
    rows = [entry for entry in entries if not isinstance(entry, str)]
    dtypes = {parameter["dtype"] for parameter in report["parameters"]}
    if len(dtypes) == 1:  # the usual case: leave out the column
        (dtype,) = dtypes
        header[0] += f" (all {dtype})" if dtype else ""
        header, *rows = ([*row[:3], row[4]] for row in (header, *rows))
    header, *lines = _align([header, *rows], right=[len(header) - 1])
    yield _bold(header)
    for entry in entries:
        yield entry if isinstance(entry, str) else lines.pop(0)


def _entries(report: dict[str, Any], every_block: bool) -> Iterator[str | _Row]:
    """Headings and rows, in the order of the parameters."""
    kinds = _kinds(report["parameters"])
    seen = set()
    for block, group in groupby(report["parameters"], lambda p: _split(p["path"])[0]):
        if not block:
            if seen:
                yield ""
            yield from (_row(parameter["path"], parameter) for parameter in group)
            continue
        kind = kinds[block]
        if kind in seen and not every_block:
            continue
        seen.add(kind)
        count = list(kinds.values()).count(kind)
        several = f"blocks.N ({kind}, {count} of {len(kinds)})"
        yield ""
        yield _bold(f"blocks.{block} ({kind})" if every_block else several)
        yield from _block_entries(list(group))


def _kinds(parameters: list[dict[str, Any]]) -> dict[str, str]:
    """The kind of mixer of each block, by its number: "recurrent" has a "recurrent_block"."""
    parts = (_split(parameter["path"]) for parameter in parameters)
    names = ((block, inside.partition("_block.")) for block, inside in parts if block)
    return {block: kind for block, (kind, found, _) in names if found and kind != "mlp"}


def _block_entries(parameters: list[dict[str, Any]]) -> Iterator[str | _Row]:
    """A block's rows; the rows of one layer are indented under its name."""
    for layer, group in groupby(parameters, lambda p: _split(p["path"])[1].split(".")[0]):
        rows = list(group)
        if len(rows) > 1:
            yield layer
        for parameter in rows:
            path = _split(parameter["path"])[1]
            yield _row("  " + path.removeprefix(f"{layer}.") if len(rows) > 1 else path, parameter)


def _split(path: str) -> tuple[str, str]:
    """A path's block number and the path inside the block; ("", path) outside blocks."""
    if not path.startswith("blocks."):
        return "", path
    _, number, inside = path.split(".", 2)
    return number, inside


def _row(name: str, parameter: dict[str, Any]) -> _Row:
    split = parameter.get("split")
    return (
        name,
        "×".join(map(str, parameter["shape"])),
        " ".join(parameter["axes"] if split is None else (axis or "-" for axis in split)),
        parameter["dtype"] or "",
        f"{parameter['count' if split is None else 'device_count']:,}",
    )


def _align(rows: Iterable[_Row], right: Iterable[int]) -> list[str]:
    """Aligns rows into lines; columns numbered in `right` align on the right."""
    rows, right = list(rows), set(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _label(name: str) -> str:
    """What a row is called: a name in JSON, or several words, of which one may be a scheme."""
    return name if " " in name else name.replace("_", " ")


def _bold(line: str) -> str:
    return typer.style(line, bold=True)


def size_text(num_bytes: float | None) -> str:
    """Bytes in the unit that fits; nothing for None."""
    if num_bytes is None:
        return ""
    if not num_bytes:
        return "0"
    for unit in ("kB", "MB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} GB"
