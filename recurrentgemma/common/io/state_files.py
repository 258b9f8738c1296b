"""States on disk: one safetensors file that either framework reads.

The model's arrays keep their names and dtypes, "seen" is packed to bits, and the header says what
model it is a state of and which tokens come next.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.io.arrays import BFLOAT16, count_nonfinite
from recurrentgemma.common.io.files import expanded, whole_file
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.state import Arrays, StateError, check_state

_FORMAT, _VERSION = "recurrentgemma-state", "1"
_DTYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS = ("BF16", "F16", "F32", "F64")
_LONGEST = 2**31 - 1  # tokens: positions are int32


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
      ValueError: The notes are no strings.
      DestinationError: `path` exists and `force` is not set, or cannot be written.
    """
    if not _is_notes(state.notes):
        raise ValueError(f"notes must be strings by name, got {state.notes!r}")
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
      StateError: It is no state file, not whole, or of another model; every difference and every
        field that no such state can have is named.
      OSError: It cannot be read.
    """
    data = expanded(path).read_bytes()
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
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StateError(
            f"{path} is no complete state file: {type(error).__name__}: {error}"
        ) from error
    _require_same_model(path, stored_config, config)
    packed = tensors.pop("seen", np.zeros((0, 0), np.uint8))
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        block, _, field = name.rpartition(".")
        arrays.setdefault(block, {})[field] = value
    stored = StoredState(arrays or None, lengths, pending, packed, notes)
    problems = list(_problems(config, stored))
    if problems:
        raise StateError(f"{path} is no whole state:\n  " + "\n  ".join(problems))
    return stored._replace(
        lengths=tuple(lengths),
        pending=tuple(map(tuple, pending)),
        seen=np.unpackbits(packed, axis=1, count=config.vocab_size).astype(bool),
    )


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


def _problems(config: GriffinConfig, stored: StoredState) -> Iterator[str]:
    """Says of each field, as it was read, what no state of the model has; `seen` is packed."""
    arrays, lengths, pending, packed, notes = stored
    if not _is_notes(notes):
        yield f"notes must be strings by name, got {_shortened(notes)}"
    if not lengths or not _are_integers(lengths, _LONGEST):
        yield f"lengths must be one a row, from 0 to {_LONGEST}, got {_shortened(lengths)}"
        return
    if not isinstance(pending, list) or len(pending) != len(lengths) or not all(
        row and _are_integers(row, config.vocab_size - 1) for row in pending
    ):  # fmt: skip
        yield (
            f"pending must be token ids below {config.vocab_size}, one at least for each of the "
            f"{len(lengths)} rows of lengths, got {_shortened(pending)}"
        )
    shape = (len(lengths), -(-config.vocab_size // 8))
    if packed.dtype != np.uint8 or packed.shape != shape:
        yield f"seen must be U8 of shape {shape}, got {_NAMES[packed.dtype]} of {packed.shape}"
    if arrays is None:
        if any(lengths):
            yield f"lengths is {_shortened(lengths)}, but there are no arrays"
        return
    try:
        check_state(config, arrays, len(lengths))
    except ValueError as error:
        yield str(error)
        return
    for block, fields in arrays.items():
        for field, value in fields.items():
            name, dtype = f"{block}.{field}", _NAMES[value.dtype]
            if field == "num_tokens":
                came = _shortened(value.tolist())
                if dtype != "I32" or value.tolist() != lengths:
                    yield f"{name} must be I32 and lengths, {lengths}, got {dtype} and {came}"
            elif dtype not in _FLOATS:
                yield f"{name} must be one of {', '.join(_FLOATS)}, got {dtype}"
            elif count := count_nonfinite(value):
                yield f"{name} must be finite, got {count} values that are not"


def _are_integers(values: Any, most: int) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= most for value in values
    )


def _is_notes(notes: Any) -> bool:
    return isinstance(notes, dict) and all(
        isinstance(text, str) for item in notes.items() for text in item
    )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


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
    start = place = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if not isinstance(header, dict):
        raise TypeError(f"its header must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__")
    if not _is_notes(metadata):
        raise TypeError(f"__metadata__ must be strings by name, got {_shortened(metadata)}")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, dtype, offsets = entry["shape"], _DTYPES[entry["dtype"]], entry["data_offsets"]
        if not _are_integers(shape, len(data)):
            raise ValueError(f"{name} has shape {_shortened(shape)}")
        end = place + math.prod(shape) * dtype.itemsize
        if offsets != [place - start, end - start]:
            raise ValueError(f"{name} must be at {place - start}, got {_shortened(offsets)}")
        if end > len(data):
            raise ValueError(f"{end} bytes are expected, got {len(data)}")
        tensors[name] = np.frombuffer(data[place:end], dtype).reshape(shape)
        place = end
    if place != len(data):
        raise ValueError(f"{place} bytes are expected, got {len(data)}")
    return tensors, metadata


def _require_same_model(path: str | os.PathLike[str], stored: Any, config: GriffinConfig) -> None:
    if not isinstance(stored, dict):
        raise StateError(f"{path}: config must be a JSON object, got {_shortened(stored)}")
    expected = config.to_dict()
    differences = [
        f"{name} is {stored.get(name)!r}, the model has {value!r}"
        for name, value in expected.items()
        if name != "scan_type" and stored.get(name) != value
    ]
    if differences:
        raise StateError(f"{path} is the state of another model: {'; '.join(differences)}")
