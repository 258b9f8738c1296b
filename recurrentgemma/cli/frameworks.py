"""The choice between JAX and PyTorch, and a sampler in either; neither is imported before."""

from __future__ import annotations

import enum
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from recurrentgemma.cli.console import be_silent
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.twin import find_twin, installed_framework

if TYPE_CHECKING:  # NumPy and sentencepiece are slow to import
    import numpy as np

    from recurrentgemma.common.generation.sampler import BaseSampler
    from recurrentgemma.common.generation.strategies import Sampling
    from recurrentgemma.common.model.layer_spec import ParamSpec
    from recurrentgemma.common.processes import Processes
    from recurrentgemma.common.tokenizer import Tokenizer


class Framework(enum.StrEnum):
    """The framework that a model runs on."""

    JAX = "jax"
    TORCH = "torch"


class DType(enum.StrEnum):
    """The dtype of parameters and computation."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Scheme(enum.StrEnum):
    """The scheme in which matrices are quantised; see `common.quantization`."""

    Q8 = "q8"
    Q4 = "q4"
    Q4_32 = "q4_32"


def choices(kind: Iterable[str]) -> str:
    """How help shows an option with these values."""
    return "|".join(kind)


MODEL = "Model"  # the panel of these options
MANY = "Many devices"

FrameworkOption = Annotated[
    Framework | None,
    typer.Option(
        help="The framework that runs the model. Default: torch if it is installed, or else jax.",
        metavar=choices(Framework),
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
DTypeOption = Annotated[
    DType | None,
    typer.Option(
        help="Dtype of parameters and computation. Default: float32 on CPU, or else bfloat16.",
        metavar=choices(DType),
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint of any format. Default: the bundled model tiny, or tiny-chat for a chat.",
        metavar="PATH",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="A tokenizer.model or tokenizer.json. Default: the checkpoint's.",
        metavar="FILE",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="LoRA adapters to add to the checkpoint: a training run's, or a folder of PEFT's.",
        metavar="PATH",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile PyTorch's step: a slow start, then faster tokens. JAX always compiles.",
        rich_help_panel=MODEL,
    ),
]
Quantize = Annotated[
    Scheme | None,
    typer.Option(
        "--quantize",
        help="Keep matrices in fewer bytes: 8 bits, or 4 in groups of 128 or of 32.",
        metavar=choices(Scheme),
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
MeshText = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Split the model over devices, as in fsdp=4,tensor=2; PyTorch's start with torchrun.",
        metavar="AXIS=N,...",
        show_default=False,
        rich_help_panel=MANY,
    ),
]
ControlTokens = Annotated[
    bool,
    typer.Option(
        "--allow-control-tokens",
        help="Read <end_of_turn> and the like as tokens where your words spell them.",
        rich_help_panel="Prompt",
    ),
]


class Loaded(NamedTuple):
    """A sampler, and what it runs on."""

    sampler: BaseSampler[Any]
    device: str
    dtype: DType
    processes: Processes


_BLOCK = 1 << 20  # values


def choose_framework(wanted: Framework | None) -> Framework:
    """The framework asked for, or else PyTorch if it is installed, or else JAX.

    Raises:
      MissingExtraError: It is not installed; the message has the pip command.
    """
    return Framework(installed_framework(wanted))


def loading(checkpoint: Path | None, framework: Framework) -> str:
    """What to show while a checkpoint is found and loaded."""
    return f"Loading {checkpoint.name if checkpoint else 'the bundled model'} with {framework}"


def find_checkpoint(
    path: Path | None, tokenizer: Path | None = None, chat: bool = False
) -> tuple[Path, Tokenizer]:
    """A checkpoint, or else a bundled one, and the tokenizer given, or else its own."""
    from recurrentgemma.common.io.checkpoint import BUNDLED_CHAT, checkpoint_path
    from recurrentgemma_conversion import open_checkpoint
    from recurrentgemma_conversion.convert import find_tokenizer

    path = BUNDLED_CHAT if path is None and chat else checkpoint_path(path)
    with open_checkpoint(path) as opened:
        return path, find_tokenizer(opened, tokenizer)


def _compiling(framework: Framework, device: str, compiled: bool) -> dict[str, bool]:
    """The settings of a sampler that compiles its decode step, where that is a choice."""
    if not compiled or framework is not Framework.TORCH:
        return {}
    names = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    if device == "cpu" and not any(name and shutil.which(name) for name in names):
        raise UserError("--compile needs a C++ compiler such as g++, which was not found")
    return {"jit_compile": True}


def default_dtype(device: str) -> DType:
    """The dtype to run in on a device unless another is asked for."""
    return DType.FLOAT32 if device == "cpu" else DType.BFLOAT16


def load_sampler(
    framework: Framework,
    path: Path,
    tokenizer: Tokenizer,
    sampling: Sampling,
    dtype: DType | None,
    chat: bool,
    allow_control_tokens: bool = False,
    adapter: Path | None = None,
    quantize: Scheme | None = None,
    compiled: bool = False,
    mesh: str | None = None,
    rows: int = 1,
) -> Loaded:
    """Loads a checkpoint, on an accelerator if there is one.

    Args:
      framework: The framework to run it on.
      path: The checkpoint.
      tokenizer: Its tokenizer.
      sampling: How tokens are chosen.
      dtype: The dtype of parameters and computation; see `default_dtype` if None.
      chat: Whether the model is instruction-tuned.
      allow_control_tokens: Whether a user's words may spell control tokens.
      adapter: LoRA adapters to add to its parameters, if any.
      quantize: The scheme in which matrices are kept; None keeps them as they are stored.
      compiled: Whether PyTorch compiles the decode step; JAX always does.
      mesh: The mesh that it is split over, if any; see `common.sharding.parse_mesh`.
      rows: How many texts grow at a time.
    """
    from recurrentgemma.common.processes import ALONE

    twin = find_twin(framework)
    device = twin.default_device()
    dtype = dtype or default_dtype(device)
    where: dict[str, Any] = {"device": device} if mesh is None else {"mesh": twin.mesh(mesh)}
    processes = ALONE if mesh is None else twin.processes(where["mesh"])
    if not processes.is_first:
        be_silent()  # another process prints the same
    decoding = 0 if mesh is not None else 1 if compiled else rows
    model = twin.load(path, dtype, adapter=adapter, quantize=quantize, decoding=decoding, **where)
    sampler = twin.sampler(
        model,
        tokenizer,
        is_it_model=chat,
        sampling=sampling,
        allow_control_tokens=allow_control_tokens,
        **_compiling(framework, device, compiled),
    )
    sampler.engine.prepares = False
    return Loaded(sampler, device, dtype, processes)


def random_sampler(
    framework: Framework,
    preset: str,
    dtype: DType | None,
    quantize: Scheme | None = None,
    compiled: bool = False,
) -> Loaded:
    """A sampler on random weights of a published size, with the bundled tokenizer."""
    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.model.families import config_from_preset
    from recurrentgemma.common.model.layer_spec import layer_spec
    from recurrentgemma.common.processes import ALONE
    from recurrentgemma.common.quantization import quantize_parameter

    twin = find_twin(framework)
    device = twin.default_device()
    dtype = dtype or default_dtype(device)
    config = config_from_preset(preset)
    values = (
        (spec.path, quantize_parameter(spec, _random_values(spec, dtype), quantize))
        for spec in layer_spec(config)
    )
    model = twin.make(config, values, dtype, device, decoding=1)
    sampler = twin.sampler(model, load_tokenizer(), **_compiling(framework, device, compiled))
    return Loaded(sampler, device, dtype, ALONE)


def _random_values(spec: ParamSpec, dtype: DType) -> np.ndarray:
    """Initial values in the Flax layout; a large parameter repeats a random block."""
    import numpy as np

    from recurrentgemma.common.io.arrays import DTYPES
    from recurrentgemma.common.model.layer_spec import sample_param

    if spec.size <= _BLOCK:
        return sample_param(spec, 0).astype(DTYPES[dtype])
    block = spec.init.sample(np.random.default_rng(0), (_BLOCK,))
    return np.resize(block.astype(DTYPES[dtype]), spec.shape)
