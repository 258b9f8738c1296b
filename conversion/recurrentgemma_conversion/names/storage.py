"""How a format stores quantised matrices: each as tensors whose names begin with its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.quantization import Quantized, input_axis, part_shapes, scheme_for

if TYPE_CHECKING:
    from recurrentgemma_conversion.names.table import Piece

Parts = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Storage(NamedTuple):
    """How a format stores quantised matrices.

    Attributes:
      scheme_for: The scheme in which it holds a parameter of a model of a scheme, from the
        parameter's pieces; None if it stores no quantised values there.
      shapes: Shape and dtype of the tensors of a piece in its own scheme, by what their names have
        behind the piece's.
      encode: These tensors.
    """

    scheme_for: Callable[[ParamSpec, Sequence[Piece], str | None], str | None]
    shapes: Callable[[ParamSpec, Piece, str], Parts]
    encode: Callable[[Quantized], Mapping[str, np.ndarray]]


OURS = Storage(
    lambda spec, pieces, scheme: scheme_for(spec, scheme),
    lambda spec, piece, scheme: part_shapes(spec.shape, scheme, input_axis(spec), spec.path),
    lambda quantized: quantized.parts,
)
