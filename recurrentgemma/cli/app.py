"""The program `recurrentgemma` and its commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import typer
import typer.main

import recurrentgemma
from recurrentgemma.cli.bench import bench
from recurrentgemma.cli.chat import chat
from recurrentgemma.cli.compilation_cache import use_compilation_cache
from recurrentgemma.cli.convert import convert
from recurrentgemma.cli.download import download
from recurrentgemma.cli.inspect import inspect
from recurrentgemma.cli.merge import merge
from recurrentgemma.cli.parity import parity
from recurrentgemma.cli.sample import sample
from recurrentgemma.cli.score import score
from recurrentgemma.cli.serve import serve
from recurrentgemma.cli.train import train

_COMPLETE = "_RECURRENTGEMMA_COMPLETE"

app = typer.Typer(
    name="recurrentgemma",
    help="RecurrentGemma and Griffin language models in JAX and in PyTorch.",
    epilog="Try: recurrentgemma sample 'It was a truth'",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(sample)
app.command()(chat)
app.command()(serve)
app.command()(score)
app.command()(inspect)
app.command()(convert)
app.command()(train)
app.command()(merge)
app.command()(parity)
app.command()(download)
app.command()(bench)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recurrentgemma {recurrentgemma.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
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
    del version
    if compilation_cache:
        use_compilation_cache()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(args: Sequence[str]) -> int:
    """Runs the program on command-line words and returns its exit code; raises every error.

    `app(args)` would report errors in its own ways.
    """
    if _COMPLETE in os.environ:  # the shell asks for completions
        app(prog_name="recurrentgemma")
    command = typer.main.get_command(app)
    try:
        with command.make_context("recurrentgemma", list(args)) as context:
            command.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    return 0
