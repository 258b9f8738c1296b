"""The inputs of `recurrentgemma train`, by its options."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurrentgemma.common.errors import UserError

if TYPE_CHECKING:
    from recurrentgemma.cli.train_options import TrainOptions
    from recurrentgemma.common.model.config import Config
    from recurrentgemma.common.tokenizer import Tokenizer
    from recurrentgemma.common.training.batch import Batch
    from recurrentgemma.common.training.data import Example
    from recurrentgemma.common.training.packing import Cut, RowStream
    from recurrentgemma.common.training.run import Plan
    from recurrentgemma.common.training.trainer import Setup

_PROMPTS = 2  # prompts to continue at each evaluation unless others are given


def read_config(options: TrainOptions, vocab_size: int | None = None) -> Config:
    """The config that the options name.

    Args:
      options: The options.
      vocab_size: Tokens of a preset's model; the published number if None.
    """
    from recurrentgemma.common.model.families import config_from_preset
    from recurrentgemma_conversion.opening import open_checkpoint, open_config

    if options.preset is not None:
        return config_from_preset(options.preset.upper(), vocab_size)
    if options.config is not None:
        return open_config(options.config)
    with open_checkpoint(options.checkpoint) as checkpoint:
        return checkpoint.config


def config_and_tokenizer(options: TrainOptions) -> tuple[Config | None, Tokenizer]:
    """The config of a model from scratch, or None for a checkpoint's weights; the tokenizer."""
    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma_conversion.opening import open_checkpoint

    if options.preset is not None or options.config is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        config = read_config(options, tokenizer.size)
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


def _require_match(tokenizer: Tokenizer, config: Config, own: Tokenizer | None = None) -> None:
    from recurrentgemma.common.errors import TokenizerError

    if not tokenizer.fits(config.vocab_size):
        raise TokenizerError(
            f"the tokenizer has {tokenizer.size} pieces, the model a vocabulary of "
            f"{config.vocab_size}"
        )
    for index in range(0 if own is None else min(own.size, tokenizer.size)):
        assert own is not None
        pieces = [t.piece(index) for t in (tokenizer, own)]
        if pieces[0] != pieces[1]:
            raise TokenizerError(
                "the tokenizer differs from the checkpoint's: "
                f"its piece {index} is {pieces[0]!r}, the checkpoint's is {pieces[1]!r}"
            )


def fingerprints(options: TrainOptions, tokenizer: Tokenizer) -> dict[str, str]:
    """The SHA-256 of every file that a run reads, by name, and of the tokenizer."""
    from recurrentgemma.common.training.data import fingerprint
    from recurrentgemma_conversion.opening import open_checkpoint

    files = {str(path): path for path in (*options.train, *options.validation)}
    with contextlib.ExitStack() as stack:
        if options.lora_rank is not None and options.checkpoint is not None:
            checkpoint = stack.enter_context(open_checkpoint(options.checkpoint))
            files |= {str(options.checkpoint / path.name): path for path in checkpoint.weights}
        hashes = {name: fingerprint(path) for name, path in files.items()}
    content = b"".join(tokenizer.files().values())
    return hashes | {"tokenizer": hashlib.sha256(content).hexdigest()}


class Data(NamedTuple):
    """The data of a run.

    Attributes:
      stream: The rows to train on.
      validation: The batches to evaluate on.
      cut: The examples in the rows.
      prompts: The prompts of the first examples to evaluate on, or else to train on.
    """

    stream: RowStream
    validation: list[Batch]
    cut: Cut
    prompts: list[str]


def read_data(options: TrainOptions, tokenizer: Tokenizer) -> Data:
    """Reads all files; the examples to evaluate on are held out.

    Raises:
      DataError: A line cannot be read; see `read_examples`.
    """
    from recurrentgemma.common.training.data import hold_out, read_examples
    from recurrentgemma.common.training.packing import RowStream, TooLong, cut, in_order

    def read(paths: Sequence[Path]) -> list[Example]:
        how = {"eos": options.eos, "allow_control_tokens": options.allow_control_tokens}
        return [example for path in paths for example in read_examples(path, tokenizer, **how)]

    examples, held_out = read(options.train), read(options.validation)
    if options.validation_share:
        examples, held_out = hold_out(examples, options.validation_share, options.seed)
    too_long = TooLong(options.too_long)
    rows = (options.length, tokenizer.pad_id)
    kept = cut(examples, options.length, too_long, options.stride)
    stream = RowStream(kept.examples, *rows, seed=options.seed, packed=options.pack)
    validation = []
    if held_out:
        held = cut(held_out, options.length, too_long, options.stride)
        validation = in_order(held.examples, *rows, options.batch_size, packed=options.pack)
    prompts = list(dict.fromkeys(example.prompt for example in (held_out or examples)[:_PROMPTS]))
    return Data(stream, validation, kept, prompts)


def make_plan(options: TrainOptions, data: Data) -> Plan:
    """The length and the schedule of the run.

    Raises:
      ValueError: It has no steps.
    """
    from recurrentgemma.common.training.run import Plan

    epochs = 1.0 if options.epochs is None else options.epochs
    rows = options.batch_size * options.accumulation
    steps = options.steps or math.ceil(epochs * data.stream.rows_in_epoch() / rows)
    if not steps:
        raise UserError(f"--epochs must be above 0, got {options.epochs}")
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
        skip_nonfinite=options.on_nonfinite == "skip",
    )


def make_setup(
    options: TrainOptions,
    config: Config | None,
    tokenizer: Tokenizer,
    steps: int,
    mesh: Any = None,
) -> Setup:
    """What to train, and how; `config_and_tokenizer` gives `config` and `tokenizer`."""
    from recurrentgemma.common.training.lora import LoraOptions
    from recurrentgemma.common.training.optimization import OptimizerOptions
    from recurrentgemma.common.training.trainer import Setup

    if "float16" in (options.dtype, options.state_dtype):
        raise UserError(
            "float16 cannot be trained in: small gradients become 0 without a scaled loss; "
            "use bfloat16 or float32"
        )
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
        skip_nonfinite=options.on_nonfinite == "skip",
    )
    lora = None
    if options.lora_rank is not None:
        lora = LoraOptions(
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=tuple(options.lora_target),
            quantize=options.quantize or options.lora_quantize,
        )
    elif options.quantize is not None:
        raise UserError(
            "--quantize keeps the weights under adapters in fewer bytes: give --lora-rank, too"
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
        mesh=mesh,
    )
