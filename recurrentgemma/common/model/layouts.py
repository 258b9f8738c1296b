"""How checkpoint formats store a parameter: names, axis orders, parts.

A layout function takes a parameter's path, the prefix of its layer in Hugging Face's names and its
shape, and returns how a PyTorch state dict and Hugging Face's checkpoints store it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from recurrentgemma.common.model.layer_spec import ParamSpec


class Stored(NamedTuple):
    """How a checkpoint format stores a parameter, or one part of it.

    The stored tensor is `parameter[part]` (or all of it), its last two axes swapped if
    `transpose`, in the shape `shape`. Both directions take NumPy or JAX arrays.
    """

    name: str
    shape: tuple[int, ...]
    part: int | None = None
    transpose: bool = False

    def encode(self, parameter: Any) -> Any:
        """The stored tensor of a parameter in the Flax layout."""
        value = parameter if self.part is None else parameter[self.part]
        return (value.swapaxes(-1, -2) if self.transpose else value).reshape(self.shape)

    def decode(self, stored: Any, spec: ParamSpec) -> Any:
        """The parameter, or its part, from the stored tensor. Inverse of `encode`."""
        shape = spec.shape if self.part is None else spec.shape[1:]
        if self.transpose:
            return stored.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
        return stored.reshape(shape)


Layouts = Callable[[str, str, tuple[int, ...]], tuple[Stored, tuple[Stored, ...]]]


def same(hf_name: str) -> Layouts:
    """Stored alike everywhere."""

    def layouts(path: str, layer: str, shape: tuple[int, ...]):
        return Stored(path, shape), (Stored(layer + hf_name, shape),)

    return layouts


def kernel(hf_name: str) -> Layouts:
    """A Flax Dense kernel: both PyTorch forms store its transpose under `weight`."""

    def layouts(path: str, layer: str, shape: tuple[int, ...]):
        name = path.removesuffix("kernel") + "weight"
        swapped = shape[::-1]
        return (
            Stored(name, swapped, transpose=True),
            (Stored(f"{layer}{hf_name}.weight", swapped, transpose=True),),
        )

    return layouts


def conv_weight(path: str, layer: str, shape: tuple[int, ...]) -> tuple[Stored, tuple[Stored, ...]]:
    """Depthwise taps: Hugging Face keeps a torch Conv1d's (channels, 1, taps)."""
    hf_shape = (shape[1], 1, shape[0])
    hf = Stored(f"{layer}temporal_block.conv_1d.weight", hf_shape, transpose=True)
    return Stored(path, shape), (hf,)


def gated_halves(leaf: str) -> Layouts:
    """`ffw_up`: Hugging Face keeps its two halves as separate layers."""

    def layouts(path: str, layer: str, shape: tuple[int, ...]):
        stored_shape = shape[:0:-1] if leaf == "weight" else shape[-1:]
        hf = tuple(
            Stored(f"{layer}mlp_block.{half}.{leaf}", stored_shape, i, transpose=leaf == "weight")
            for i, half in enumerate(("gate_proj", "up_proj"))
        )
        return Stored(path, shape), hf

    return layouts
