"""`recurrentgemma train`: trains or fine-tunes a model on JSON lines."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import choose_framework
from recurrentgemma.cli.train_options import (
    TrainOptions,
    differences,
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
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
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


class _Prepared(NamedTuple):
    """A run that can be started."""

    run: Run
    finish: Callable[[], dict[str, Any]]


@contextlib.contextmanager
def _prepared(
    out: Path, given: dict[str, Any], from_file: dict[str, Any], resume: bool, force: bool
) -> Iterator[_Prepared]:
    """Reads all that a run needs, then makes or opens its folder: mistakes change nothing."""
    from recurrentgemma.cli.train_display import (
        Logs,
        Observer,
        Plot,
        TensorBoard,
        Terminal,
        require_tensorboard,
    )
    from recurrentgemma.cli.trainers import make_trainer
    from recurrentgemma.common.data import fingerprint
    from recurrentgemma.common.files import whole_file
    from recurrentgemma.common.loss_plot import can_draw, require_matplotlib
    from recurrentgemma.common.run import Run
    from recurrentgemma.common.run_folder import RunFolder

    folder = RunFolder(out)
    resume = resume and folder.options.is_file()
    stored, files = read_toml(folder.options) if resume else ({}, {})
    options = merged(given, from_file, stored)
    if resume:
        _require_same(folder, TrainOptions(**stored), options)
    else:
        folder.require_free(force=force)
    options = _resolved(options)
    if options.tensorboard:
        require_tensorboard()
    if options.plot:
        require_matplotlib()
    with working("Reading"):
        hashes = {str(path): fingerprint(path) for path in (*options.train, *options.validation)}
        if resume:
            _require_same_files(folder, files, hashes)
        config, tokenizer = _model(options)
        data = _read(options, tokenizer)
    _say(options, data)
    plan = _plan(options, data)
    with working("Loading the model"):
        assert options.framework is not None
        trainer = make_trainer(options.framework, _setup(options, config, tokenizer, plan.steps))
    progress = None
    if resume:
        folder.clean()
        if steps := folder.steps():
            progress, arrays = folder.load(steps[-1])
            trainer.load(progress.step, arrays)
            data.stream.position = progress.position
            sys.stderr.write(f"going on from {folder.checkpoint(progress.step)}\n")
    else:
        folder.begin()
    with whole_file(folder.options, force=True) as file:
        file.write_text(to_toml(options, hashes), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        done = trainer.step
        observers: list[Observer] = [Logs(folder, done if progress else -1)]
        if options.tensorboard:
            observers.append(TensorBoard(folder, done))
        observers.append(Terminal(plan.steps, done, trainer.memory))
        if can_draw() if options.plot is None else options.plot:
            observers.append(Plot(folder))
        for observer in observers:
            stack.enter_context(observer)
        run = Run(plan, trainer, data.stream, data.validation, folder, observers, progress)

        def finish() -> dict[str, Any]:
            trainer.save(folder.model, folder.adapters)
            return _summary(folder, run)

        yield _Prepared(run, finish)


class _Data(NamedTuple):
    """What a run reads.

    Attributes:
      stream: The rows to train on.
      validation: The batches to evaluate on.
      cut: The examples in the rows.
      prompts: Of the first examples to evaluate on, or else to train on.
    """

    stream: Stream
    validation: list[Batch]
    cut: Cut
    prompts: list[str]


def _require_same(folder: RunFolder, before: TrainOptions, now: TrainOptions) -> None:
    if changed := differences(before, now):
        raise ValueError(
            f"{folder.path} was begun with other options, with which alone it can be resumed: "
            f"{'; '.join(changed)}"
        )


def _require_same_files(folder: RunFolder, before: dict[str, str], now: dict[str, str]) -> None:
    if changed := [name for name, digest in now.items() if before.get(name) != digest]:
        raise ValueError(
            f"{folder.path} cannot be resumed, since its data is no longer what it was: "
            f"{', '.join(changed)}"
        )


def _resolved(options: TrainOptions) -> TrainOptions:
    """The options with what depends on the machine, checked against each other."""
    from recurrentgemma.cli.trainers import training_dtype
    from recurrentgemma.common.packing import TooLong
    from recurrentgemma.common.presets import member

    if not options.train:
        raise ValueError("--train must name a JSONL file")
    for names in (
        ("validation", "validation_share"),
        ("steps", "epochs"),
        ("checkpoint", "preset", "config"),
    ):
        require_one_of(options, names)
    member(TooLong, options.too_long)
    framework = choose_framework(options.framework)
    dtype = options.dtype or training_dtype(framework)
    return dataclasses.replace(options, framework=framework, dtype=dtype)


def _model(options: TrainOptions) -> tuple[GriffinConfig | None, Tokenizer]:
    """The config of a model from scratch, or None for a checkpoint's weights; the tokenizer."""
    from recurrentgemma.common.checkpoint import load_tokenizer, read_config
    from recurrentgemma.common.config import GriffinConfig
    from recurrentgemma_conversion.opening import open_checkpoint

    if options.preset is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        return GriffinConfig.from_preset(options.preset.upper(), tokenizer.size), tokenizer
    if options.config is not None:
        config, tokenizer = read_config(options.config), load_tokenizer(options.tokenizer)
        _require_match(tokenizer, config)
        return config, tokenizer
    with open_checkpoint(options.checkpoint) as checkpoint:
        config = checkpoint.config
        if options.tokenizer is None:
            tokenizer = checkpoint.load_tokenizer()
        else:
            tokenizer = load_tokenizer(options.tokenizer)
        own = None if checkpoint.tokenizer is None else checkpoint.load_tokenizer()
    _require_match(tokenizer, config, None if options.from_scratch else own)
    return config if options.from_scratch else None, tokenizer


def _require_match(
    tokenizer: Tokenizer, config: GriffinConfig, own: Tokenizer | None = None
) -> None:
    from recurrentgemma.common.errors import TokenizerError

    if tokenizer.size != config.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.size} pieces, the model a vocabulary of "
            f"{config.vocab_size}"
        )
    for index in range(0 if own is None else min(own.size, tokenizer.size)):
        assert own is not None
        pieces = [t.vocab.id_to_piece(index) for t in (tokenizer, own)]
        if pieces[0] != pieces[1]:
            raise TokenizerError(
                "the tokenizer is not that of the checkpoint: "
                f"its piece {index} is {pieces[0]!r}, the checkpoint's is {pieces[1]!r}"
            )


def _read(options: TrainOptions, tokenizer: Tokenizer) -> _Data:
    from recurrentgemma.common.data import hold_out, read_examples
    from recurrentgemma.common.packing import Stream, TooLong, cut, in_order

    def read(paths: Sequence[Path]) -> list[Example]:
        return [
            example for path in paths for example in read_examples(path, tokenizer, eos=options.eos)
        ]

    examples, held_out = read(options.train), read(options.validation)
    if options.validation_share:
        examples, held_out = hold_out(examples, options.validation_share, options.seed)
    too_long = TooLong(options.too_long)
    rows = (options.length, tokenizer.pad_id)
    kept = cut(examples, options.length, too_long, options.stride)
    stream = Stream(kept.examples, *rows, seed=options.seed, packed=options.pack)
    validation = []
    if held_out:
        held = cut(held_out, options.length, too_long, options.stride)
        validation = in_order(held.examples, *rows, options.batch_size, packed=options.pack)
    prompts = list(dict.fromkeys(example.prompt for example in (held_out or examples)[:_PROMPTS]))
    return _Data(stream, validation, kept, prompts)


def _say(options: TrainOptions, data: _Data) -> None:
    """Tells what there is to train on, on stderr."""
    cut = data.cut
    tokens = sum(example.places for example in cut.examples)
    line = f"{tokens:,} tokens in {data.stream.rows_in_epoch():,} rows of {options.length}"
    if cut.too_long:
        done = {"skip": "skipped", "truncate": "truncated"}.get(options.too_long, "split")
        line += f"; {cut.too_long:,} examples are longer and were {done}"
    if cut.empty:
        line += f"; {cut.empty:,} left out, with nothing to predict"
    sys.stderr.write(line + "\n")


def _plan(options: TrainOptions, data: _Data) -> Plan:
    from recurrentgemma.common.run import Plan

    epochs = 1.0 if options.epochs is None else options.epochs
    rows = options.batch_size * options.accumulation
    steps = options.steps or math.ceil(epochs * data.stream.rows_in_epoch() / rows)
    if not steps:
        raise ValueError(f"--epochs must be above 0, got {options.epochs}")
    return Plan(
        steps=steps,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        keep=options.keep,
        prompts=(options.sample_prompt or data.prompts) if options.sample_tokens else (),
        sample_tokens=options.sample_tokens,
    )


def _setup(
    options: TrainOptions, config: GriffinConfig | None, tokenizer: Tokenizer, steps: int
) -> Setup:
    from recurrentgemma.cli.trainers import Setup
    from recurrentgemma.common.lora import LoraOptions
    from recurrentgemma.common.optimization import OptimizerOptions

    optimizer = OptimizerOptions(
        name=options.optimizer,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        momentum=options.momentum,
        clip_norm=options.clip_norm or None,
        warmup_steps=options.warmup_steps,
        total_steps=steps,
        final_fraction=options.final_fraction,
    )
    lora = None
    if options.lora_rank is not None:
        lora = LoraOptions(
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=tuple(options.lora_target),
            quantize=options.lora_quantize,
        )
    assert options.dtype is not None
    return Setup(
        checkpoint=options.checkpoint,
        config=config,
        tokenizer=tokenizer,
        dtype=options.dtype,
        gradient_checkpointing=options.gradient_checkpointing,
        optimizer=optimizer,
        lora=lora,
        state_dtype=options.state_dtype,
        seed=options.seed,
    )


def _summary(folder: RunFolder, run: Run) -> dict[str, Any]:
    from recurrentgemma.common.training_log import read_log

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
