"""`recurrentgemma train`: trains or fine-tunes a model on JSON lines."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from recurrentgemma.cli.frameworks import choose_framework
from recurrentgemma.cli.train_options import (
    FIELDS,
    TrainOptions,
    differences,
    flag,
    merged,
    parameters,
    read_toml,
    require_one_of,
    to_toml,
)

if TYPE_CHECKING:
    from recurrentgemma.cli.trainers import Setup
    from recurrentgemma.common.batch import Batch
    from recurrentgemma.common.config import GriffinConfig
    from recurrentgemma.common.data import Example
    from recurrentgemma.common.packing import Cut, Stream
    from recurrentgemma.common.run import Plan, Run
    from recurrentgemma.common.run_folder import RunFolder
    from recurrentgemma.common.text import Tokenizer

_PROMPTS = 2  # continued at each evaluation where none are given
_TERMINATED = 143


def train(
    context: typer.Context,
    options: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of options by their long names; flags win.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or begin it.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run in --out.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line.")
    ] = False,
    **flags: Any,
) -> None:
    """Train a model from scratch, fine-tune one, or train adapters for one.

    Data is JSONL: {"text": ...}; {"prompt": ..., "completion": ...}, of which the completion is
    learnt; or {"messages": [{"role": "user", "content": ...}, {"role": "model", ...}]}, of which
    the model's turns are.
    """
    from recurrentgemma.common.run import Interrupted

    given = {
        name: value
        for name, value in flags.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    from_file = read_toml(options)[0] if options is not None else {}
    out = given.get("out", from_file.get("out"))
    if out is None:
        raise ValueError("--out must name the folder of the run")
    if resume and force:
        raise ValueError("--resume and --force exclude each other")
    try:
        with _prepared(out, given, from_file, resume, force) as prepared:
            prepared.run()
            summary = prepared.finish()
    except Interrupted as interrupted:
        sys.stderr.write(f"recurrentgemma: {interrupted}; --resume goes on\n")
        raise typer.Exit(128 + interrupted.signal) from None
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(_line(summary))


# typer reads the options of a command from its signature.
_own = [p for p in inspect.signature(train).parameters.values() if p.name != "flags"]
train.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
    [*_own, *parameters()]
)
train.__annotations__ = {p.name: p.annotation for p in (*_own, *parameters())}
