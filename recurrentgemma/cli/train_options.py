"""The options of `recurrentgemma train`: as flags, in a TOML file, and in the run's folder."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recurrentgemma.cli.frameworks import MANY, DType, Framework, choices
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.io.text import text_of
from recurrentgemma.common.model.presets import Preset

_FILES = "files"  # the table of hashes in a run's own file


def _option(panel: str, help: str, *names: str, metavar: str | None = None, **limits: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **limits)


class OnNonFinite(enum.StrEnum):
    """What becomes of a step whose loss or gradient is NaN or infinite."""

    STOP = "stop"
    SKIP = "skip"


_DATA, _MODEL, _OPTIMIZER, _RUN = "Data", "Model", "Optimiser", "Run"
_EXCLUSIVE = (
    ("validation", "validation_share"),
    ("steps", "epochs"),
    ("checkpoint", "preset", "config"),
)
# A resumed run may change these: its weights do not depend on them.
_FREE = frozenset(
    [
        "framework",
        "mesh",
        "out",
        "evaluate_every",
        "checkpoint_every",
        "keep",
        "log_every",
        "sample_prompt",
        "sample_tokens",
        "plot",
        "tensorboard",
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that defines a training run; a field is a flag and a key of the TOML file."""

    train: Annotated[
        list[Path],
        _option(_DATA, "A JSONL file to train on.", metavar="FILE", show_default=False),
    ] = dataclasses.field(default_factory=list)
    validation: Annotated[
        list[Path],
        _option(_DATA, "A JSONL file to evaluate on.", metavar="FILE", show_default=False),
    ] = dataclasses.field(default_factory=list)
    validation_share: Annotated[
        float | None,
        _option(_DATA, "Or hold out this share of the examples.", metavar="P", min=0, max=1,
                show_default=False),
    ] = None  # fmt: skip
    length: Annotated[
        int, _option(_DATA, "Tokens in a row that the model reads.", min=1, metavar="N")
    ] = 256
    stride: Annotated[
        int | None,
        _option(_DATA, "Tokens between windows of a split example. Default: the length.", min=1,
                metavar="N", show_default=False),
    ] = None  # fmt: skip
    too_long: Annotated[
        str,
        _option(
            _DATA,
            "What becomes of examples longer than a row.",
            metavar="split|truncate|skip",
        ),
    ] = "split"
    pack: Annotated[
        bool, _option(_DATA, "Several examples in a row, or each in its own.", "--pack/--no-pack")
    ] = True
    eos: Annotated[
        bool, _option(_DATA, "Whether EOS ends texts and completions.", "--eos/--no-eos")
    ] = True
    allow_control_tokens: Annotated[
        bool,
        _option(
            _DATA,
            "Read <end_of_turn> and the like as tokens where a message spells them.",
            "--allow-control-tokens",
        ),
    ] = False
    seed: Annotated[
        int, _option(_DATA, "Seed of the order and of initial values.", min=0, metavar="N")
    ] = 0

    framework: Annotated[
        Framework | None,
        _option(
            _MODEL,
            "The framework that trains. Default: torch if it is installed, or else jax.",
            metavar=choices(Framework),
            show_default=False,
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        _option(
            _MODEL,
            "Train this further. Default: the bundled model.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None
    from_scratch: Annotated[
        bool,
        _option(_MODEL, "Begin with random weights, in the checkpoint's config.",
                "--from-scratch"),
    ] = False  # fmt: skip
    preset: Annotated[
        str | None,
        _option(_MODEL, f"From scratch: {', '.join(p.name for p in Preset)}.", metavar="NAME",
                show_default=False),
    ] = None  # fmt: skip
    config: Annotated[
        Path | None,
        _option(
            _MODEL,
            "From scratch: the model in this config.json.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        _option(
            _MODEL,
            "A tokenizer.model or tokenizer.json. Default: the checkpoint's.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None
    dtype: Annotated[
        DType | None,
        _option(
            _MODEL,
            "Dtype of the parameters. Default: float32 on CPU, or else bfloat16.",
            metavar=choices(DType),
            show_default=False,
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool,
        _option(_MODEL, "Compute each block again in the backward pass, for less memory.",
                "--gradient-checkpointing/--no-gradient-checkpointing"),
    ] = True  # fmt: skip
    lora_rank: Annotated[
        int | None,
        _option(
            _MODEL, "Train adapters of this rank alone.", min=1, metavar="R", show_default=False
        ),
    ] = None
    lora_alpha: Annotated[
        float, _option(_MODEL, "Adapters are scaled by alpha / rank.", metavar="A")
    ] = 16.0
    lora_target: Annotated[
        list[str],
        _option(_MODEL, "The layers that get adapters.", metavar="attention|recurrent|mlp|gates"),
    ] = dataclasses.field(default_factory=lambda: ["attention", "recurrent", "mlp"])
    lora_quantize: Annotated[
        bool, _option(_MODEL, "The same as --quantize q8.", "--lora-quantize")
    ] = False
    quantize: Annotated[
        str | None,
        _option(
            _MODEL,
            "Keep the weights under the adapters in 8 bits, or in 4 (groups of 128 or of 32).",
            metavar="q8|q4|q4_32",
            show_default=False,
        ),
    ] = None

    optimizer: Annotated[
        str, _option(_OPTIMIZER, "How parameters are updated.", metavar="adamw|sgd|adafactor")
    ] = "adamw"
    learning_rate: Annotated[float, _option(_OPTIMIZER, "The highest rate.", metavar="X")] = 3e-4
    warmup_steps: Annotated[
        int,
        _option(
            _OPTIMIZER,
            "Steps until the rate is highest.",
            min=0,
            metavar="N",
        ),
    ] = 0
    final_fraction: Annotated[
        float,
        _option(_OPTIMIZER, "The last rate, as a share of the highest.", metavar="P"),
    ] = 0.1
    weight_decay: Annotated[
        float,
        _option(_OPTIMIZER, "For kernels, not norms or biases.", metavar="X"),
    ] = 0.1
    b1: Annotated[float, _option(_OPTIMIZER, "AdamW's.", metavar="X")] = 0.9
    b2: Annotated[float, _option(_OPTIMIZER, "AdamW's.", metavar="X")] = 0.95
    eps: Annotated[float, _option(_OPTIMIZER, "AdamW's.", metavar="X")] = 1e-8
    momentum: Annotated[float, _option(_OPTIMIZER, "SGD's.", metavar="X")] = 0.9
    clip_norm: Annotated[
        float,
        _option(_OPTIMIZER, "Largest gradient norm; 0 for no limit.", min=0, metavar="X"),
    ] = 1.0
    state_dtype: Annotated[
        DType,
        _option(
            _OPTIMIZER,
            "Dtype of the optimiser's state and its copy of parameters.",
            metavar=choices(DType),
        ),
    ] = DType.FLOAT32

    out: Annotated[
        Path | None, _option(_RUN, "The folder of the run.", metavar="FOLDER", show_default=False)
    ] = None
    steps: Annotated[
        int | None, _option(_RUN, "Updates in all.", min=1, metavar="N", show_default=False)
    ] = None
    epochs: Annotated[
        float | None,
        _option(
            _RUN, "Or passes over the data. Default: 1.", min=0, metavar="X", show_default=False
        ),
    ] = None
    batch_size: Annotated[int, _option(_RUN, "Rows read at once.", min=1, metavar="N")] = 8
    accumulation: Annotated[
        int, _option(_RUN, "Batches whose gradients make one update.", min=1, metavar="N")
    ] = 1
    evaluate_every: Annotated[
        int, _option(_RUN, "Steps between evaluations.", min=1, metavar="N")
    ] = 100
    checkpoint_every: Annotated[
        int, _option(_RUN, "Steps between checkpoints.", min=1, metavar="N")
    ] = 100
    keep: Annotated[
        int,
        _option(_RUN, "Last checkpoints to keep, beside the best.", min=1, metavar="K"),
    ] = 2
    log_every: Annotated[
        int, _option(_RUN, "Steps between looks at the loss.", min=1, metavar="N")
    ] = 10
    on_nonfinite: Annotated[
        OnNonFinite,
        _option(
            _RUN,
            "At a loss that is NaN or infinite: end, or leave out that step.",
            metavar=choices(OnNonFinite),
        ),
    ] = OnNonFinite.STOP
    sample_prompt: Annotated[
        list[str],
        _option(_RUN, "A prompt to continue at evaluations. Default: from the data.",
                metavar="TEXT", show_default=False),
    ] = dataclasses.field(default_factory=list)  # fmt: skip
    sample_tokens: Annotated[
        int, _option(_RUN, "Tokens to continue prompts with; 0 for none.", min=0, metavar="N")
    ] = 32
    mesh: Annotated[
        str | None,
        _option(
            MANY,
            "Split the model over devices, as in fsdp=4,tensor=2; PyTorch's start with torchrun.",
            metavar="AXIS=N,...",
            show_default=False,
        ),
    ] = None
    plot: Annotated[
        bool | None,
        _option(_RUN, "Draw loss.png. Default: if matplotlib is installed.", "--plot/--no-plot",
                show_default=False),
    ] = None  # fmt: skip
    tensorboard: Annotated[bool, _option(_RUN, "Log for TensorBoard, too.", "--tensorboard")] = (
        False
    )


FIELDS = tuple(field.name for field in dataclasses.fields(TrainOptions))
_TYPES = typing.get_type_hints(TrainOptions)


def parameters() -> list[inspect.Parameter]:
    """The fields as parameters of a function for typer."""
    hints = typing.get_type_hints(TrainOptions, include_extras=True)
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(TrainOptions(), name),
            annotation=hints[name],
        )
        for name in FIELDS
    ]


def read_toml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The options in a TOML file, and the hashes of data files if a run wrote it.

    Keys are named like the flags, with "-" or "_".

    Raises:
      ValueError: It is not TOML, or keys are unknown or have a wrong type; all are listed.
      OSError: It cannot be read.
    """
    try:
        values = tomllib.loads(text_of(path.read_bytes(), str(path)))
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    files = values.pop(_FILES, {})
    options, problems = {}, []
    for key, value in values.items():
        name = key.replace("-", "_")
        try:
            if name in options:
                raise UserError(f"{name} is given twice")
            options[name] = _converted(name, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return options, files


def _converted(name: str, value: Any) -> Any:
    if name not in FIELDS:
        raise UserError(f"unknown option {name!r}")
    kind = _TYPES[name]
    kinds = [k for k in typing.get_args(kind) or (kind,) if k is not type(None)]
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [_as_kind(name, kinds[0], item) for item in items]
    return _as_kind(name, kinds[0], value)


def _as_kind(name: str, kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    stored = str if issubclass(kind, Path | enum.Enum) else kind
    if type(value) is not stored:
        raise UserError(f"{name} must be of type {stored.__name__}, got {value!r}")
    return kind(value)


def to_toml(options: TrainOptions, files: Mapping[str, str]) -> str:
    """The options as a TOML file, with the hashes of data files."""
    lines = [f"{name} = {_toml(value)}" for name, value in vars(options).items()
             if value is not None]  # fmt: skip
    lines += ["", f"[{_FILES}]  # SHA-256"]
    lines += [f"{_toml(name)} = {_toml(digest)}" for name, digest in files.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML one, but for surrogates and the control character U+007F.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def differences(before: TrainOptions, now: TrainOptions) -> list[str]:
    """The options that must stay the same when a run is resumed, but changed."""
    return [
        f"{name} was {_toml(getattr(before, name))}, is {_toml(getattr(now, name))}"
        for name in FIELDS
        if name not in _FREE and getattr(before, name) != getattr(now, name)
    ]


def merged(given: Mapping[str, Any], *lower: Mapping[str, Any]) -> TrainOptions:
    """Merges options: those that are given win over the lower ones, and over what they exclude.

    `~` in a path is the home: no shell expands it in a TOML file, and not all do in `--out=~/run`.
    """
    values: dict[str, Any] = {}
    for layer in (*reversed(lower), given):
        for group in _EXCLUSIVE:
            if any(layer.get(name) for name in group):
                values = {name: value for name, value in values.items() if name not in group}
        values |= layer
    return TrainOptions(**{name: _at_home(value) for name, value in values.items()})


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return expanded(value) if isinstance(value, Path) else value


def require_consistent(options: TrainOptions) -> None:
    """Raises `ValueError` if options exclude each other."""
    for group in _EXCLUSIVE:
        given = [f"--{name.replace('_', '-')}" for name in group if getattr(options, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other")
