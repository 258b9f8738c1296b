"""How our twins hold parameters, whichever the family: in a Flax tree, and in a state dict."""

from __future__ import annotations

from collections.abc import Sequence

from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.model.state_dict import is_kernel, torch_name, torch_shape
from recurrentgemma_conversion.names.table import Entry, Layout, Piece


def flax_layout(specs: Sequence[ParamSpec]) -> Layout:
    """Each parameter under its path, as it is."""
    return Layout(specs, [_entry(spec, spec.path, spec.shape) for spec in specs])


def torch_layout(specs: Sequence[ParamSpec]) -> Layout:
    """Each parameter as `torch.nn.Module` has it: kernels are transposed."""
    return Layout(
        specs,
        [_entry(s, torch_name(s.path), torch_shape(s.path, s.shape)) for s in specs],
    )


def _entry(spec: ParamSpec, name: str, shape: tuple[int, ...]) -> Entry:
    order = list(range(len(shape)))
    if name != spec.path and is_kernel(spec.path):
        order[-2:] = order[:-3:-1]
    return Entry((spec,), (Piece(spec.path, None, name, None, spec.shape, tuple(order), shape),))
