"""Help as panels in a terminal and as a page of the documentation, from one description."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

_WIDEST = 100
_OPTIONS, _ARGUMENTS, _COMMANDS = "Options", "Arguments", "Commands"


class Entry(NamedTuple):
    """An option, an argument or a command.

    Attributes:
      usage: How it is typed: its names, and a word for its value.
      text: What it does, in sentences.
    """

    usage: str
    text: str


class Page(NamedTuple):
    """The help of a command, or of the program.

    Attributes:
      usage: How it is typed.
      paragraphs: What it does.
      panels: Its entries by title.
    """

    usage: str
    paragraphs: list[str]
    panels: dict[str, list[Entry]]


def described(command: Any, path: str) -> Page:
    """The help of one of typer's commands.

    Args:
      command: The command.
      path: What is typed to run it, such as "recurrentgemma sample".
    """
    panels: dict[str, list[Entry]] = {}
    words = [path, "[OPTIONS]"]
    options = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            panels.setdefault(_ARGUMENTS, []).append(_argument(parameter))
            words.append(_argument(parameter).usage)
        elif not parameter.hidden:
            options.append(parameter)
    for option in options:
        title = option.rich_help_panel or _OPTIONS
        panels.setdefault(title, []).append(_option(option))
    if hasattr(command, "commands"):
        words += ["COMMAND", "..."]
        panels[_COMMANDS] = [
            Entry(name, _paragraphs(each.help)[0]) for name, each in command.commands.items()
        ]
    if _OPTIONS in panels:  # what has no panel of its own comes last
        panels[_OPTIONS] = panels.pop(_OPTIONS)
    panels.setdefault(_OPTIONS, []).append(Entry("-h, --help", "Show this page and exit."))
    return Page(" ".join(words), _paragraphs(command.help), panels)


def _argument(parameter: Any) -> Entry:
    word = (parameter.metavar or parameter.name).upper()
    return Entry(word if parameter.required else f"[{word}]", parameter.help or "")


def _option(parameter: Any) -> Entry:
    names = sorted(parameter.opts, key=len)
    usage = "/".join([", ".join(names), *parameter.secondary_opts])
    if not parameter.is_flag:
        usage += f" {parameter.metavar}"
    sentences = [parameter.help or ""]
    if parameter.required:
        sentences.append("Required.")
    if parameter.multiple:
        sentences.append("Repeatable.")
    if defaults := _defaults(parameter):
        sentences.append(f"Default: {', '.join(defaults)}.")
    return Entry(usage, " ".join(sentences))


def _defaults(parameter: Any) -> list[str]:
    """An option's values unless others are given, as help shows them."""
    value = parameter.default
    if value is None or parameter.show_default is not True:
        return []
    if parameter.is_flag:
        on, off = parameter.opts[:1], parameter.secondary_opts[:1]
        return (on if value else off) if off else []
    values = value if isinstance(value, list | tuple) else [value]
    return [f"{one:g}" if isinstance(one, float) else str(one) for one in values]


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in (text or "").split("\n\n")]


def as_text(page: Page, epilog: str | None = None) -> str:
    """The page for a terminal, in panels as wide as it is, up to 100 columns."""
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    console.width = width = min(console.width, _WIDEST)
    inside = width - 4  # of the borders
    columns = (len(usage) + 2 for entries in page.panels.values() for usage, _ in entries)
    left = max(column for column in (2, *columns) if column <= inside * 3 // 8)
    with console.capture() as capture:
        console.print(Text.assemble(("Usage: ", "yellow"), (page.usage, "bold")))
        for paragraph in page.paragraphs:
            console.print()
            console.print(Text("\n".join(_wrapped(paragraph, width))))
        console.print()
        for title, entries in page.panels.items():
            text = Text("\n").join(
                Text.assemble((line[:end], "bold cyan"), line[end:])
                for line, end in _lines(entries, left, inside)
            )
            panel = Panel(text, title=title, title_align="left", border_style="dim", box=ROUNDED)
            console.print(panel)
        if epilog:
            console.print(Text(epilog))
    return capture.get().rstrip("\n")


def _lines(entries: list[Entry], left: int, width: int) -> Iterator[tuple[str, int]]:
    """Lines of at most `width` characters, and how many characters of each are the usage.

    The text begins in column `left`, below the usage where that is longer.
    """
    for usage, text in entries:
        lines = _wrapped(text, width - left)
        if len(usage) + 2 > left:
            yield usage, len(usage)
        else:
            yield usage.ljust(left) + lines.pop(0), len(usage)
        for line in lines:
            yield " " * left + line, 0


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False) or [""]


def as_markdown(page: Page) -> Iterator[str]:
    """The page's lines in the documentation."""
    yield "```text"
    yield page.usage
    yield "```"
    for paragraph in page.paragraphs:
        yield ""
        yield _escaped(paragraph)
    for title, entries in page.panels.items():
        yield ""
        yield f"**{title}**"
        yield ""
        for usage, text in entries:
            yield f"- `{usage}`: {_escaped(text)}"


def _escaped(text: str) -> str:
    """Text with what Markdown or HTML would read as its own."""
    for sign in "\\*_{[":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;")
