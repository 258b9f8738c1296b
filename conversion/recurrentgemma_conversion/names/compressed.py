"""Quantised matrices as the library `compressed-tensors` packs them, which `transformers` opens.

Its format `pack-quantized` stores the weight of a linear layer, [N, K], as

    weight_packed      int32, [N, K / 8] in 4 bits, [N, K / 4] in 8: the first value is the lowest
    weight_scale       [N, G], with G groups of inputs
    weight_zero_point  int32, [N / 8, G]: the zeros of 8 outputs; in 4 bits where it is asymmetric
    weight_shape       int64: N and K

where sizes are rounded up. Values have no sign: one of 8 bits is ours plus 128; one of 4 bits, and
its zero, are as ours. Embeddings are no linear layers, nor are the gates of the RG-LRU: they stay
dense, and so do layers whose inputs are not whole groups.

The config has `transformers` dequantise while it loads. Left to itself it would do so before the
first pass; until then version 5.23 fails on RecurrentGemma, whose initialisation asks for the dense
weights, and on zeros, of which the packed shape is not expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.quantization import (
    SCHEMES,
    Quantized,
    pack,
    part_shapes,
    scheme_for,
    unpack,
)
from recurrentgemma_conversion.names.storage import Parts, Storage

if TYPE_CHECKING:
    from recurrentgemma_conversion.names.table import Piece

FIELD = "quantization_config"
PACKED, SCALE, ZERO, SHAPE = "_packed", "_scale", "_zero_point", "_shape"
_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_OFFSET = 0x80  # flips the sign bit: adds 128
_WORD, _INT64 = np.dtype("<i4"), np.dtype(np.int64)


def _scheme_for(spec: ParamSpec, pieces: Sequence[Piece], scheme: str | None) -> str | None:
    held = scheme_for(spec, scheme)
    if held is None or not spec.matrix or any(piece.order != (1, 0) for piece in pieces):
        return None
    group = SCHEMES[held].group
    return None if group and any(piece.shape[1] % group for piece in pieces) else held


def _shapes(spec: ParamSpec, piece: Piece, scheme: str) -> Parts:
    ours = part_shapes(piece.shape, scheme, -1, spec.path)
    scales, dtype = ours[".scale"]
    return tensor_shapes(piece.shape, scales, SCHEMES[scheme].bits, ".zero" in ours, dtype)


def tensor_shapes(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    bits: int,
    asymmetric: bool,
    dtype: np.dtype,
) -> Parts:
    """Shape and dtype of the tensors of a matrix, by what their names have behind the matrix's.

    Args:
      shape: The shape of the matrix, [N, K].
      scales: The shape of its scales, [N, G].
      bits: Bits of a value.
      asymmetric: Whether there are zeros.
      dtype: The dtype of the scales.
    """
    outputs, inputs = shape
    zeros = {ZERO: ((_words(outputs, bits), scales[1]), _WORD)} if asymmetric else {}
    packed = {PACKED: ((outputs, _words(inputs, bits)), _WORD), SCALE: (scales, dtype)}
    return {**packed, **zeros, SHAPE: ((2,), _INT64)}


def encode(quantized: Quantized) -> dict[str, np.ndarray]:
    """The tensors of a matrix; in 4 bits the values are a view where whole words hold a row."""
    values, outputs = quantized.values, len(quantized.scale)
    inputs = values.shape[-1] * 8 // SCHEMES[quantized.scheme].bits
    if quantized.zero is None:
        values = values.view(np.uint8) ^ np.uint8(_OFFSET)
    parts = {PACKED: _as_words(values), SCALE: quantized.scale}
    if quantized.zero is not None:
        zero = quantized.zero.T.astype(np.uint8)
        zero = np.pad(zero, ((0, 0), (0, outputs % 2)))
        parts[ZERO] = np.ascontiguousarray(_as_words(pack(zero)).T)
    return parts | {SHAPE: np.array([outputs, inputs], _INT64)}


def decode(parts: Mapping[str, np.ndarray], bits: int) -> tuple[np.ndarray, ...]:
    """Values, scales and in 4 bits zeros, as a `Quantized` has them: the inverse of `encode`."""
    outputs, inputs = map(int, parts[SHAPE])
    values = parts[PACKED].view(np.uint8)[:, : inputs * bits // 8]
    scale = np.asarray(parts[SCALE], np.float32)
    if bits == 8:
        return (values ^ np.uint8(_OFFSET)).view(np.int8), scale
    if ZERO not in parts:  # symmetric
        return values, scale, np.full(scale.shape, 8, np.int8)
    zero = unpack(np.ascontiguousarray(parts[ZERO].T).view(np.uint8))
    return values, scale, np.ascontiguousarray(zero.T[:outputs]).view(np.int8)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD.itemsize // 8)


def _as_words(values: np.ndarray) -> np.ndarray:
    """Rows of bytes as rows of words; the last word is filled with zeros."""
    missing = -values.shape[1] % _WORD.itemsize
    values = np.pad(values, ((0, 0), (0, missing))) if missing else values
    return np.ascontiguousarray(values).view(_WORD)


def config_fields(scheme: str, dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a model of a scheme; `dense` linear layers are left out."""
    bits, group = SCHEMES[scheme]
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": bits == 8,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }
    activations = {"input_activations": None, "output_activations": None}
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **activations}},
        "dequantize": True,
        "format": _FORMAT,
        "ignore": ["lm_head", *dense],
        "kv_cache_scheme": None,
        "quant_method": _METHOD,
        "quantization_status": "compressed",
    }


def bits_of(path: Path, said: Any) -> int:
    """The bits of a value that a `quantization_config` states.

    Raises:
      ConfigError: It is of another method or format, or has values of several widths.
    """
    said = said if isinstance(said, dict) else {}
    method = said.get("quant_method")
    if (method, said.get("format")) != (_METHOD, _FORMAT):
        raise ConfigError(
            f"{path}: quantised weights must be {_METHOD} in the format {_FORMAT}, got {method} in "
            f"{said.get('format')}: convert the checkpoint that they were made from"
        )
    try:
        weights = [group["weights"] for group in said["config_groups"].values()]
        found = {(args["type"], args["num_bits"]) for args in weights}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {FIELD} is incomplete ({error!r})") from error
    if len(found) != 1 or not found <= {("int", 4), ("int", 8)}:
        listed = ", ".join(sorted(f"{kind}{bits}" for kind, bits in found))
        raise ConfigError(f"{path}: weights must be int4 or int8 throughout, got {listed}")
    return found.pop()[1]


def scheme_of(path: Path, bits: int, matrices: Mapping[str, tuple[int, int, bool]]) -> str:
    """The scheme that holds matrices exactly.

    Args:
      path: The checkpoint, for messages.
      bits: Bits of a value.
      matrices: The inputs and groups of each matrix, and whether it has zeros, by name.

    Raises:
      ConfigError: No scheme of ours does; it names a matrix.
    """
    odd = ""
    for scheme, (width, group) in SCHEMES.items():
        if width != bits:
            continue
        wrong = (
            name
            for name, (inputs, groups, asymmetric) in matrices.items()
            if groups * min(group or inputs, inputs) != inputs or (asymmetric and bits == 8)
        )
        if not (odd := next(wrong, "")):
            return scheme
    inputs, groups, _ = matrices[odd]
    raise ConfigError(
        f"{path}: int8 weights must have one scale for each output and no zeros, and int4 weights "
        f"groups of 128 or of 32 inputs; {odd} has int{bits} and {groups} groups of {inputs} inputs"
    )


COMPRESSED = Storage(_scheme_for, _shapes, encode)
