"""The program `recurrentgemma` and its commands."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

import recurrentgemma
from recurrentgemma.cli.console import speaking
from recurrentgemma.cli.help import as_text, described

NAME = "recurrentgemma"
COMMANDS = (
    "sample",
    "chat",
    "serve",
    "score",
    "inspect",
    "convert",
    "train",
    "merge",
    "parity",
    "download",
    "bench",
)
_COMPLETE = "_RECURRENTGEMMA_COMPLETE"
_SETTINGS = {"help_option_names": ["-h", "--help"]}


class Command(typer.core.TyperCommand):
    """A command with our help."""

    def get_help(self, ctx: Any) -> str:
        return as_text(described(self, ctx.command_path))


class Program(typer.core.TyperGroup):
    """The program with our help; each command is imported when it is first asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = _Commands()

    def get_help(self, ctx: Any) -> str:
        return as_text(described(self, ctx.command_path), self.epilog)


class _Commands(Mapping[str, Any]):
    """The commands by name."""

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        return _command(name)


@functools.cache
def _command(name: str) -> Any:
    """The command of the module with its name."""
    alone = typer.Typer(add_completion=False, context_settings=_SETTINGS)
    function = getattr(importlib.import_module(f"recurrentgemma.cli.{name}"), name)
    alone.command(cls=Command)(function)
    return typer.main.get_command(alone)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {recurrentgemma.__version__}")
        raise typer.Exit


def _program(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
    compilation_cache: Annotated[
        bool,
        typer.Option(
            "--compilation-cache/--no-compilation-cache",
            help="Keep what JAX compiled for the next command, in the user's cache folder.",
        ),
    ] = True,
) -> None:
    """RecurrentGemma, Griffin and Gemma in JAX and in PyTorch."""
    from recurrentgemma.cli.compilation_cache import use_compilation_cache

    del version
    if compilation_cache:
        use_compilation_cache()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@functools.cache
def program() -> Any:
    """The program as typer's command."""
    app = typer.Typer(cls=Program, context_settings=_SETTINGS)
    app.callback(invoke_without_command=True, epilog=f"Try: {NAME} sample 'It was a truth'")(
        _program
    )
    return typer.main.get_command(app)


def run(args: Sequence[str]) -> int:
    """Runs the program on command-line words and returns its exit code; raises every error.

    typer's own `main` would report errors in its own ways.
    """
    if _COMPLETE in os.environ:  # the shell asks for completions
        program().main(prog_name=NAME)
    try:
        with speaking(), program().make_context(NAME, list(args)) as context:
            program().invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    return 0
