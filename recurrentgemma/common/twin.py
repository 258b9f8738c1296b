"""The twins: what each framework's half of the package provides.

Callers pass and receive NumPy arrays (bfloat16 in NumPy's extension type). A model, a state and a
training state are the framework's own values, which callers only hand back. Dtypes are names.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from recurrentgemma.common.errors import MissingExtraError
from recurrentgemma.common.extras import is_installed, require

if TYPE_CHECKING:  # NumPy and sentencepiece are slow to import
    import numpy as np

    from recurrentgemma.common.generation.sampler import BaseSampler
    from recurrentgemma.common.model.config import Config
    from recurrentgemma.common.processes import Processes
    from recurrentgemma.common.quantization import Quantized
    from recurrentgemma.common.tokenizer import Tokenizer
    from recurrentgemma_conversion.overrides import Overrides

PACKAGES = {"torch": ("torch",), "jax": ("jax", "flax")}  # PyTorch first: the default


class Outputs(NamedTuple):
    """What a forward pass returns.

    Attributes:
      activations: The activations asked for, by name, [B, T, ...], and "logits" after them.
      state: The state after the last token.
    """

    activations: dict[str, np.ndarray]
    state: Any


class Twin(Protocol):
    """One framework's half of the package.

    A device is a framework's name for it ("cpu", "cuda", "gpu", "tpu"); where it is None, arrays go
    where `load_checkpoint` puts them. A model has a `config`.

    Attributes:
      name: "jax" or "torch".
    """

    name: str

    @property
    def training(self) -> ModuleType:
        """Its module of training functions; both twins' have the same."""
        ...

    @property
    def products(self) -> ModuleType:
        """Its module of products with stored matrices; both twins' have the same functions."""
        ...

    def default_device(self) -> str:
        """The accelerator if there is one, or else "cpu"."""
        ...

    def memory(self) -> int | None:
        """The most bytes held so far: on the accelerator, or else by this process."""
        ...

    def precision(self, dtype: str) -> AbstractContextManager[Any]:
        """Inside it the framework computes in this dtype; JAX needs it for float64."""
        ...

    def to_numpy(self, array: Any) -> np.ndarray:
        """A framework's array, bit for bit."""
        ...

    def from_numpy(self, array: np.ndarray, dtype: str, device: str | None = None) -> Any:
        """An array of the framework, cast."""
        ...

    def join(
        self,
        coordinator: str | None = None,
        processes: int | None = None,
        process_id: int | None = None,
    ) -> None:
        """Joins the other processes of a run; see `runtime.processes`."""
        ...

    def mesh(self, text: str) -> Any:
        """The mesh that a text names, once the processes of the run have met; see `make_mesh`."""
        ...

    def processes(self, mesh: Any) -> Processes:
        """The processes of a mesh."""
        ...

    def load(
        self,
        path: str | os.PathLike[str] | None,
        dtype: str,
        device: str | None = None,
        overrides: Overrides | None = None,
        adapter: str | os.PathLike[str] | None = None,
        quantize: str | None = None,
        decoding: int = 0,
        mesh: Any = None,
    ) -> Any:
        """The model in a checkpoint of any format, or the bundled model; see `load_checkpoint`.

        `decoding` is how many rows a sampler adds tokens to at a time, if nothing else takes the
        parameters: they may then be in the form in which that is fast.
        """
        ...

    def make(
        self,
        config: Config,
        params: Iterable[tuple[str, np.ndarray | Quantized]],
        dtype: str,
        device: str | None = None,
        decoding: int = 0,
    ) -> Any:
        """A model with these parameters: pairs of a path and an array in the Flax layout.

        A `Quantized` stays so, and computes in the dtype. For `decoding` see `load`.
        """
        ...

    def init(
        self,
        config: Config,
        seed: int,
        dtype: str,
        device: str | None = None,
        mesh: Any = None,
    ) -> Any:
        """A model with initial parameters; a seed gives the same ones in both twins."""
        ...

    def save(
        self,
        path: str | os.PathLike[str],
        model: Any,
        tokenizer: Tokenizer,
        *,
        force: bool = False,
    ) -> None:
        """Writes a checkpoint folder; see `save_checkpoint`."""
        ...

    def params(self, model: Any) -> dict[str, np.ndarray]:
        """The model's parameters in the Flax layout, by path."""
        ...

    def quantized(self, model: Any) -> dict[str, Quantized]:
        """The quantised parameters in the framework's arrays, by path."""
        ...

    def dequantizing(self, model: Any) -> Any:
        """The model with every product in the dequantised form (see `common.quantization`)."""
        ...

    def init_state(self, model: Any, batch_size: int, capacity: int | None = None) -> Any:
        """The state before the first token; see `Model.init_cache`."""
        ...

    def state_arrays(self, state: Any) -> dict[str, np.ndarray]:
        """The arrays of a state, by "blocks.N.field"."""
        ...

    def forward(
        self,
        model: Any,
        tokens: np.ndarray,
        segment_pos: np.ndarray,
        state: Any = None,
        names: tuple[str, ...] = (),
    ) -> Outputs:
        """A forward pass from a state, or from the start if None.

        Args:
          model: The model.
          tokens: [B, T].
          segment_pos: [B, T]; see `Model`.
          state: The state to continue from; it is not changed.
          names: Which activations to return, of `activations.activation_names`.
        """
        ...

    def gradients(
        self, model: Any, tokens: np.ndarray, segment_pos: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The gradient for every parameter, by path.

        The loss is the mean of -log p over each document's tokens but its first.
        """
        ...

    def sampler(self, model: Any, vocab: Any, **settings: Any) -> BaseSampler[Any]:
        """A sampler on the model."""
        ...

    def train_state(
        self, model: Any, *, gradient_checkpointing: bool, state_dtype: str, **options: Any
    ) -> Any:
        """The state before the first step; `options` are those of `create_train_state`."""
        ...

    def trained(self, state: Any) -> Any:
        """The model of a training state, adapters merged."""
        ...


def installed_framework(wanted: str | None = None) -> str:
    """The framework asked for, or else PyTorch if it is installed, or else JAX; not imported.

    Raises:
      MissingExtraError: It is not installed; the message has the pip command.
    """
    if wanted is not None:
        require(*PACKAGES[wanted])
        return wanted
    for framework, packages in PACKAGES.items():
        if all(map(is_installed, packages)):
            return framework
    commands = " or pip install ".join(f"'recurrentgemma[{name}]'" for name in PACKAGES)
    raise MissingExtraError("this", "PyTorch or JAX", commands)


def find_twin(wanted: str | None = None) -> Twin:
    """Imports the twin of `installed_framework`."""
    name = installed_framework(wanted)
    return importlib.import_module(f"recurrentgemma.{name}.twin").TWIN


def process_memory() -> int | None:
    """The most bytes of memory that this process has held, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
