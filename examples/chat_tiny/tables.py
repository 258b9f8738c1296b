"""The facts of this example, as tables of rows, and the kinds of question that ask about them."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLD_TESTAMENT = 39  # books
HELD_OUT = "? "
PRONOUNS = {"he": "him", "she": "her"}

Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """Rows to train on, and rows held out to measure with."""

    rows: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Kind:
    """A kind of question; wordings.toml says what the fields are."""

    name: str
    about: str
    table: str
    ask: list[str]
    answer: str
    short: str
    held_out: tuple[str, ...] = ()
    key: str = ""
    after: str = ""
    other: bool = False
    system: tuple[str, ...] = ()
    held_out_system: tuple[str, ...] = ()
    weight: float = 1.0


def read_kinds() -> dict[str, Kind]:
    """The kinds of wordings.toml, by name."""
    values = tomllib.loads((HERE / "wordings.toml").read_text(encoding="utf-8"))
    return {name: Kind(name, **fields) for name, fields in values.items()}


def read_tables(passages: Mapping[str, list[str]]) -> dict[str, Table]:
    """The tables by the names that kinds have for them; `passages` are texts by source."""
    tables = {
        f"{part}.{name}": table
        for part in ("austen", "bible", "talk")
        for name, table in read_file(HERE / f"{part}.toml").items()
    }
    books = [
        row | {"testament": "Old" if number < OLD_TESTAMENT else "New"}
        for number, row in enumerate(tables["bible.books"].rows)
    ]
    tables["bible.books"] = Table(books, [])
    tables["talk.once"] = Table([{}], [])
    for source, texts in passages.items():
        tables[f"corpus.{source}"] = Table([{"passage": text} for text in texts], [])
    return tables


def read_file(path: Path) -> dict[str, Table]:
    """The tables in a TOML file, by name."""
    texts = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: _table(text) for name, text in texts.items()}


def _table(text: str) -> Table:
    """The rows of a text whose first line names the columns."""
    first, *lines = text.strip().splitlines()
    columns = [column.strip() for column in first.split("|")]

    def row(line: str) -> Row:
        return dict(zip(columns, (cell.strip() for cell in line.split("|")), strict=True))

    kept = [row(line) for line in lines if not line.startswith(HELD_OUT)]
    held = [row(line.removeprefix(HELD_OUT)) for line in lines if line.startswith(HELD_OUT)]
    return Table(kept, held)


def names(row: Row) -> list[str]:
    """The names that a row's person goes by; the first is the one that answers use."""
    return [name.strip() for name in row.get("name", "").split(" / ")]


def filled(template: str, row: Row, name: str | None = None) -> str:
    """A template with a row's cells; `{Cell}` begins with a capital letter."""
    cells = {cell: text.replace('"', "") for cell, text in row.items()}
    cells["name"] = name or names(row)[0]
    cells["them"] = PRONOUNS.get(row.get("they", ""), "")
    capitals = {cell.capitalize(): text[:1].upper() + text[1:] for cell, text in cells.items()}
    return template.format(**capitals, **cells)
