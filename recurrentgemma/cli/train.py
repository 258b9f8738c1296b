"""`recurrentgemma train`: trains or fine-tunes a model on JSON lines."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import MANY, choose_framework, default_dtype
from recurrentgemma.cli.train_inputs import (
    Data,
    config_and_tokenizer,
    fingerprints,
    make_plan,
    make_setup,
    read_data,
)
from recurrentgemma.cli.train_options import (
    TrainOptions,
    differences,
    merged,
    parameters,
    read_toml,
    require_consistent,
    to_toml,
)
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.twin import find_twin

if TYPE_CHECKING:
    from recurrentgemma.common.processes import Processes
    from recurrentgemma.common.training.run import TrainingRun
    from recurrentgemma.common.training.run_folder import RunFolder


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
        bool, typer.Option("--resume", help="Continue the run in --out, or begin it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line.")
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="The address of the first of several processes, where no launcher says it.",
            metavar="HOST:PORT",
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="How many processes train together.",
            metavar="N",
            min=1,
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            help="Which of them this is, from 0.",
            metavar="I",
            min=0,
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(
            "--compile-only",
            help="Train nothing: compile a step for TPUs that need not be there, as v5e:16x16, and "
            "show the memory of a chip and what it sends. Needs JAX and libtpu.",
            metavar="TOPOLOGY",
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Train a model from scratch, fine-tune one, or train adapters for one.

    Data is JSONL: {"text": ...}; {"prompt": ..., "completion": ...}, which trains on the
    completion; or {"messages": [{"role": "user", "content": ...}, {"role": "model", ...}]}, which
    trains on the model's turns.
    """
    from recurrentgemma.common.io.files import expanded, held_folder
    from recurrentgemma.common.processes import ALONE
    from recurrentgemma.common.training.run import Interrupted
    from recurrentgemma.common.training.run_folder import RunFolder

    given = {
        name: value
        for name, value in flags.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    from_file = read_toml(expanded(options))[0] if options is not None else {}
    if topology is not None:
        from recurrentgemma.cli.compile_only import compile_only

        compile_only(topology, merged(given, from_file), as_json=as_json)
        return
    out = merged(given, from_file).out
    if out is None:
        raise UserError("--out must name the folder of the run")
    if resume and force:
        raise UserError("--resume and --force exclude each other")
    folder, met = RunFolder(out), ALONE
    resume = resume and folder.options.is_file()
    stored, files = read_toml(folder.options) if resume else ({}, {})
    stored.pop("mesh", None)  # a run may continue on another
    chosen = merged(given, from_file, stored)
    if resume:
        _require_same(folder, TrainOptions(**stored), chosen)
    try:
        mesh, met = _meet(chosen, coordinator, processes, process_id)
        start = _Start(chosen, files, mesh, met, resume, force)
        folder = RunFolder(out, met)
        with contextlib.ExitStack() as stack:
            if not resume:
                met.by_first(lambda: folder.require_free(force=force))
            met.by_first(lambda: stack.enter_context(held_folder(out)))
            prepared = stack.enter_context(_prepared(folder, start))
            prepared.run()
            summary = prepared.finish()
    except Interrupted as interrupted:
        if met.is_first:
            sys.stderr.write(f"recurrentgemma: {interrupted}; --resume continues\n")
        raise typer.Exit(128 + interrupted.signal) from None
    except Exception as error:
        if (reason := met.lost(error)) is None:
            raise
        raise UserError(f"another process of this run ended: {reason}") from error
    if met.is_first:
        typer.echo(json.dumps(summary) if as_json else _line(summary))


class _Start(NamedTuple):
    """How a run starts.

    Attributes:
      options: The options, without the defaults of the machine.
      files: The hashes of the inputs of the run that is resumed.
      mesh: The mesh, if there is one.
      processes: The processes that train together.
      resume: Whether the run in the folder continues.
      force: Whether a new run may replace the one in the folder.
    """

    options: TrainOptions
    files: dict[str, str]
    mesh: Any
    processes: Processes
    resume: bool
    force: bool


def _meet(
    options: TrainOptions, coordinator: str | None, count: int | None, process_id: int | None
) -> tuple[Any, Processes]:
    """The mesh, if there is to be one, and the processes of the run."""
    from recurrentgemma.common.processes import ALONE

    if options.mesh is None:
        if (count := int(count or os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise UserError(
                f"{count} processes run this command together: --mesh fsdp={count} splits the "
                "model over them"
            )
        return None, ALONE
    twin = find_twin(choose_framework(options.framework))
    twin.join(coordinator, count, process_id)
    mesh = twin.mesh(options.mesh)
    return mesh, twin.processes(mesh)


class _Prepared(NamedTuple):
    """A run that is ready to start."""

    run: TrainingRun
    finish: Callable[[], dict[str, Any]]


@contextlib.contextmanager
def _prepared(folder: RunFolder, start: _Start) -> Iterator[_Prepared]:
    """Reads all inputs, then makes or opens the folder, so that mistakes change nothing."""
    from recurrentgemma.cli.train_display import (
        Logs,
        Observer,
        Plot,
        TensorBoard,
        Terminal,
        require_tensorboard,
    )
    from recurrentgemma.common.io.files import whole_file
    from recurrentgemma.common.training.loss_plot import can_draw, require_matplotlib
    from recurrentgemma.common.training.run import TrainingRun
    from recurrentgemma.common.training.trainer import Trainer

    processes, resume = start.processes, start.resume
    if not resume:
        processes.by_first(lambda: folder.require_free(force=start.force))
    options = _resolved(start.options)
    processes.require_same(
        "options", {f"--{n.replace('_', '-')}": v for n, v in vars(options).items()}
    )
    if options.tensorboard:
        require_tensorboard()
    if options.plot:
        require_matplotlib()
    with _working("Reading", processes):
        config, tokenizer = config_and_tokenizer(options)
        hashes = fingerprints(options, tokenizer)
        if resume:
            _require_same_files(folder, start.files, hashes)
        data = read_data(options, tokenizer)
    processes.require_same("inputs", hashes)
    say = sys.stderr.write if processes.is_first else len  # the others say nothing
    say(_amount(options, data))
    plan = make_plan(options, data)
    with _working("Loading the model", processes):
        assert options.framework is not None
        setup = make_setup(options, config, tokenizer, plan.steps, start.mesh)
        trainer = Trainer(find_twin(options.framework), setup)
    trained, total = trainer.num_trainable, trainer.num_parameters
    say(f"training {trained:,} of {total:,} parameters ({trained / total:.2%})\n")
    progress = None
    if resume:
        processes.by_first(folder.clean)
        if steps := folder.steps():
            progress, arrays = folder.load(steps[-1])
            trainer.load(progress.step, arrays)
            data.stream.position = progress.position
            say(f"continuing from {folder.checkpoint(progress.step)}\n")

    def begin() -> None:
        if not resume:
            folder.begin()
        with whole_file(folder.options, force=True) as file:
            file.write_text(to_toml(options, hashes), encoding="utf-8")

    processes.by_first(begin)
    with contextlib.ExitStack() as stack:
        done = trainer.step
        observers: list[Observer] = []
        if processes.is_first:
            observers.append(Logs(folder, done if progress else -1))
            if options.tensorboard:
                observers.append(TensorBoard(folder, done))
            observers.append(Terminal(plan.steps, done, trainer.memory))
            if can_draw() if options.plot is None else options.plot:
                observers.append(Plot(folder))
        for observer in observers:
            stack.enter_context(observer)
        run = TrainingRun(
            plan, trainer, data.stream, data.validation, folder, observers, progress, processes
        )

        def finish() -> dict[str, Any]:
            trainer.save(folder.model, folder.adapters)
            return _summary(folder, run) if processes.is_first else {}

        yield _Prepared(run, finish)


def _require_same(folder: RunFolder, before: TrainOptions, now: TrainOptions) -> None:
    if changed := differences(before, now):
        raise UserError(
            f"{folder.path} must be resumed with the options that it began with: "
            f"{'; '.join(changed)}"
        )


def _require_same_files(folder: RunFolder, before: dict[str, str], now: dict[str, str]) -> None:
    if changed := [name for name, digest in now.items() if before.get(name) != digest]:
        raise UserError(
            f"{folder.path} cannot be resumed, since these inputs have changed: "
            f"{', '.join(changed)}"
        )


def _resolved(options: TrainOptions) -> TrainOptions:
    """The options, checked, with the defaults that depend on the machine."""
    from recurrentgemma.common.model.presets import member
    from recurrentgemma.common.training.packing import TooLong

    if not options.train:
        raise UserError("--train must name a JSONL file")
    require_consistent(options)
    member(TooLong, options.too_long)
    framework = choose_framework(options.framework)
    dtype = options.dtype or default_dtype(find_twin(framework).default_device())
    return dataclasses.replace(options, framework=framework, dtype=dtype)


def _working(message: str, processes: Processes) -> contextlib.AbstractContextManager[None]:
    """Shows in the first process that the program is working."""
    return working(message) if processes.is_first else contextlib.nullcontext()


def _amount(options: TrainOptions, data: Data) -> str:
    """A line with the amount of data."""
    cut = data.cut
    tokens = sum(example.places for example in cut.examples)
    line = f"{tokens:,} tokens in {data.stream.rows_in_epoch():,} rows of {options.length}"
    if cut.too_long:
        done = {"skip": "skipped", "truncate": "truncated"}.get(options.too_long, "split")
        line += f"; {cut.too_long:,} longer examples were {done}"
    if cut.empty:
        line += f"; {cut.empty:,} left out, with nothing to predict"
    return line + "\n"


def _summary(folder: RunFolder, run: TrainingRun) -> dict[str, Any]:
    from recurrentgemma.common.training.logs import read_log

    progress = run.progress
    steps, evaluations = read_log(folder.train_log), read_log(folder.validation_log)
    return {
        "model": str(folder.model),
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "loss": steps[-1]["loss"] if steps else None,
        "validation_loss": evaluations[-1]["loss"] if evaluations else None,
        "best": None if progress.best is None else progress.best._asdict(),
    }


def _line(summary: dict[str, Any]) -> str:
    parts = [f"{summary['model']}: {summary['steps']} steps in {summary['seconds']} s"]
    if summary["loss"] is not None:
        parts.append(f"training loss {summary['loss']:.4f}")
    if summary["validation_loss"] is not None:
        parts.append(f"validation loss {summary['validation_loss']:.4f}")
    if summary["best"] is not None:
        parts.append(f"best {summary['best']['loss']:.4f} at step {summary['best']['step']}")
    return ", ".join(parts)


# typer reads the options of a command from its signature.
_own = [p for p in inspect.signature(train, eval_str=True).parameters.values() if p.name != "flags"]
train.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
    [*_own, *parameters()]
)
train.__annotations__ = {p.name: p.annotation for p in (*_own, *parameters())}
