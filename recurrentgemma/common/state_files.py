"""States on disk: one safetensors file that either framework reads.

The model's arrays keep their names and dtypes, "seen" is packed to bits, and the header says what
model it is a state of and which tokens come next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.arrays import BFLOAT16
from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.files import whole_file
from recurrentgemma.common.state import Arrays, StateError, state_shapes

_FORMAT, _VERSION = "recurrentgemma-state", "1"
_DTYPES = {
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StoredState(NamedTuple):
    """What a state file holds.

    Attributes:
      arrays: The model's state; None before the first token.
      lengths: As in `State`.
      pending: As in `State`.
      seen: As in `State`.
      notes: What whoever saved it wanted kept beside it.
    """

    arrays: Arrays | None
    lengths: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    seen: np.ndarray
    notes: dict[str, str]


def write_state(
    path: str | os.PathLike[str], config: GriffinConfig, state: StoredState, *, force: bool = False
) -> None:
    """Writes a state file: whole, or not at all.

    Raises:
      DestinationError: `path` exists and `force` is not set, or cannot be written.
    """
    tensors = {"seen": np.packbits(state.seen, axis=1)}
    for block, fields in (state.arrays or {}).items():
        tensors |= {f"{block}.{field}": value for field, value in fields.items()}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(config.to_dict()),
        "lengths": json.dumps(state.lengths),
        "pending": json.dumps(state.pending),
        "notes": json.dumps(state.notes),
    }
    with whole_file(path, force=force) as temporary:
        temporary.write_bytes(_serialized(tensors, header))


def read_state(path: str | os.PathLike[str], config: GriffinConfig) -> StoredState:
    """Reads a state file.

    Raises:
      StateError: It is no state file, not whole, or of another model (every difference is named).
      OSError: It cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        tensors, header = _deserialized(data)
        if header["format"] != _FORMAT:
            raise StateError(f"{path} is no state: its header says {header['format']!r}")
        if header["version"] != _VERSION:
            raise StateError(
                f"{path} is a state of version {header['version']}, {_VERSION} is expected"
            )
        stored_config, lengths, pending, notes = (
            json.loads(header[name]) for name in ("config", "lengths", "pending", "notes")
        )
    except StateError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path} is no complete state file: {error}") from error
    _require_same_model(path, stored_config, config)
    packed = tensors.pop("seen", np.zeros((0, 0), np.uint8))
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name in state_shapes(config):
        if name in tensors:
            block, _, field = name.rpartition(".")
            arrays.setdefault(block, {})[field] = tensors[name]
    batch = len(lengths)
    if packed.shape != (batch, -(-config.vocab_size // 8)) or len(pending) != batch:
        raise StateError(f"{path} is no complete state file: its tables differ in length")
    seen = np.unpackbits(packed, axis=1, count=config.vocab_size).astype(bool)
    return StoredState(arrays or None, tuple(lengths), tuple(map(tuple, pending)), seen, notes)


def narrowed(arrays: Arrays, cache: Any) -> Arrays:
    """A framework's cache as arrays of its own dtypes, from `arrays` with bfloat16 as float32."""
    return {
        block: {
            field: value.astype(BFLOAT16)
            if str(getattr(cache[block], field).dtype).endswith("bfloat16")
            else value
            for field, value in fields.items()
        }
        for block, fields in arrays.items()
    }


def widened(arrays: Arrays) -> Arrays:
    """The arrays with bfloat16 as float32."""
    return {
        block: {
            field: value.astype(np.float32) if value.dtype == BFLOAT16 else value
            for field, value in fields.items()
        }
        for block, fields in arrays.items()
    }


def _serialized(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        offsets = {"shape": value.shape, "data_offsets": [begin, end]}
        header[name] = {"dtype": _NAMES[value.dtype], **offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    return b"".join([*parts, *(value.tobytes() for value in tensors.values())])


def _deserialized(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata in the bytes of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__")
    tensors, ends = {}, [0]
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[start + begin : start + end], _DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
        ends.append(end)
    if start + max(ends) != len(data):
        raise ValueError(f"{start + max(ends)} bytes are expected, got {len(data)}")
    return tensors, metadata


def _require_same_model(
    path: str | os.PathLike[str], stored: Mapping[str, Any], config: GriffinConfig
) -> None:
    expected = config.to_dict()
    differences = [
        f"{name} is {stored.get(name)!r}, the model has {value!r}"
        for name, value in expected.items()
        if name != "scan_type" and stored.get(name) != value
    ]
    if differences:
        raise StateError(f"{path} is the state of another model: {'; '.join(differences)}")
