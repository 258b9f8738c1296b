"""The choice between JAX and PyTorch, and a sampler in either: neither is imported before."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from recurrentgemma.common.extras import is_installed

if TYPE_CHECKING:  # NumPy and sentencepiece are slow to import
    from recurrentgemma.common.generation.sampler import BaseSampler
    from recurrentgemma.common.generation.strategies import Sampling
    from recurrentgemma.common.model.layer_spec import ParamSpec
    from recurrentgemma.common.tokenizer import Tokenizer


class Framework(enum.StrEnum):
    """What the model runs on."""

    JAX = "jax"
    TORCH = "torch"


class DType(enum.StrEnum):
    """Of parameters and computation."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


FrameworkOption = Annotated[
    Framework | None,
    typer.Option(help="Default: torch if it is installed, or else jax.", show_default=False),
]
DTypeOption = Annotated[
    DType | None,
    typer.Option(help="Default: float32 on CPU, or else bfloat16.", show_default=False),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint of any format. Default: the bundled model, not tuned to chat.",
        metavar="PATH",
        show_default=False,
    ),
]


class Loaded(NamedTuple):
    """A sampler, and what it runs on."""

    sampler: BaseSampler[Any]
    device: str
    dtype: DType


_BLOCK = 1 << 20  # values
_MODULES = {Framework.TORCH: ("torch",), Framework.JAX: ("jax", "flax")}


def choose_framework(wanted: Framework | None) -> Framework:
    """The framework asked for, or else PyTorch where it is installed, or else JAX.

    Raises:
      ValueError: It is not installed; the message says how to install it.
    """
    candidates = list(_MODULES) if wanted is None else [wanted]
    for framework in candidates:
        if all(map(is_installed, _MODULES[framework])):
            return framework
    commands = " or ".join(f"pip install 'recurrentgemma[{f}]'" for f in candidates)
    if wanted is None:
        raise ValueError(f"neither PyTorch nor JAX is installed: {commands}")
    raise ValueError(f"--framework {wanted} needs what is not installed: {commands}")


def find_checkpoint(path: Path | None) -> tuple[Path, Tokenizer]:
    """A checkpoint, or else the bundled one, and its tokenizer."""
    from recurrentgemma.common.io.checkpoint import BUNDLED
    from recurrentgemma_conversion import open_checkpoint

    path = path or BUNDLED
    with open_checkpoint(path) as opened:
        return path, opened.load_tokenizer()


def load_sampler(
    framework: Framework,
    path: Path,
    tokenizer: Tokenizer,
    sampling: Sampling,
    dtype: DType | None,
    chat: bool,
) -> Loaded:
    """Loads a checkpoint; on an accelerator if there is one.

    Args:
      framework: What to run it on.
      path: The checkpoint folder.
      tokenizer: Its tokenizer.
      sampling: How tokens are chosen.
      dtype: Of parameters and computation; if None float32 on CPU and bfloat16 elsewhere.
      chat: Whether the model is instruction-tuned.
    """
    load = _load_torch if framework is Framework.TORCH else _load_jax
    return load(path, tokenizer, sampling, dtype, chat)


def default_dtype(device: str) -> DType:
    """What to run in on a device, where nothing is said."""
    return DType.FLOAT32 if device == "cpu" else DType.BFLOAT16


def _load_torch(
    path: Path, tokenizer: Tokenizer, sampling: Sampling, dtype: DType | None, chat: bool
) -> Loaded:
    import torch

    from recurrentgemma.torch import Sampler, load_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or default_dtype(device)
    model = load_checkpoint(path, dtype=getattr(torch, dtype), device=device)
    sampler = Sampler(model, tokenizer.vocab, is_it_model=chat, sampling=sampling)
    return Loaded(sampler, device, dtype)


def _load_jax(
    path: Path, tokenizer: Tokenizer, sampling: Sampling, dtype: DType | None, chat: bool
) -> Loaded:
    import jax

    from recurrentgemma.jax import Sampler, load_checkpoint

    device = jax.default_backend()
    dtype = dtype or default_dtype(device)
    model, params = load_checkpoint(path, dtype=jax.numpy.dtype(dtype))
    sampler = Sampler(model, tokenizer.vocab, params, is_it_model=chat, sampling=sampling)
    return Loaded(sampler, device, dtype)


def random_sampler(framework: Framework, preset: str, dtype: DType | None) -> Loaded:
    """A sampler on random weights of a published size, with the bundled tokenizer."""
    make = _random_torch if framework is Framework.TORCH else _random_jax
    return make(preset, dtype)


def _random_values(spec: ParamSpec, dtype: DType) -> Any:
    """Initial values in the Flax layout; a large parameter repeats a random block."""
    import numpy as np

    from recurrentgemma.common.io.arrays import DTYPES
    from recurrentgemma.common.model.layer_spec import sample_param

    if spec.size <= _BLOCK:
        return sample_param(spec, 0).astype(DTYPES[dtype])
    block = spec.init.sample(np.random.default_rng(0), (_BLOCK,))
    return np.resize(block.astype(DTYPES[dtype]), spec.shape)


def _random_torch(preset: str, dtype: DType | None) -> Loaded:
    import torch

    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.model.layer_spec import layer_spec
    from recurrentgemma.common.model.state_dict import to_torch, torch_name
    from recurrentgemma.torch import Griffin, GriffinConfig, Sampler
    from recurrentgemma.torch.runtime.arrays import to_tensor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or default_dtype(device)
    model = Griffin(GriffinConfig.from_preset(preset), device="meta")
    state = {
        torch_name(spec.path): to_tensor(to_torch(spec.path, _random_values(spec, dtype))).to(
            device
        )
        for spec in layer_spec(model.config)
    }
    model.load_state_dict(state, assign=True)
    return Loaded(Sampler(model, load_tokenizer()), device, dtype)


def _random_jax(preset: str, dtype: DType | None) -> Loaded:
    import jax

    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.model.layer_spec import layer_spec
    from recurrentgemma.jax import Griffin, GriffinConfig, Sampler
    from recurrentgemma.jax.griffin import set_path

    device = jax.default_backend()
    dtype = dtype or default_dtype(device)
    model = Griffin(GriffinConfig.from_preset(preset), param_dtype=jax.numpy.dtype(dtype))
    params: dict[str, Any] = {}
    for spec in layer_spec(model.config):
        set_path(params, spec.path, jax.numpy.asarray(_random_values(spec, dtype)))
    return Loaded(Sampler(model, load_tokenizer(), params), device, dtype)
