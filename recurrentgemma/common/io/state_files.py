"""States on disk: one safetensors file that either framework reads.

The model's arrays keep their names, dtypes and bits; "seen" is packed to bits. The header names the
model and the tokens that come next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.arrays import DTYPES, count_nonfinite
from recurrentgemma.common.io.files import expanded, whole_file
from recurrentgemma.common.io.tensor_files import DTYPE_NAMES, TensorFile, write_tensors
from recurrentgemma.common.model.config import Config, config_from_dict
from recurrentgemma.common.model.layer_spec import state_spec
from recurrentgemma.common.model.state import Arrays, StateError, check_state

_FORMAT, _VERSION = "recurrentgemma-state", "1"
_FLOATS = [DTYPE_NAMES[dtype] for dtype in DTYPES.values()]
_LONGEST = 2**31 - 1  # tokens: positions are int32


class StoredState(NamedTuple):
    """The contents of a state file; `State` describes lengths, pending and seen.

    Attributes:
      arrays: The model's state; None before the first token.
      notes: The caller's own strings, by name.
    """

    arrays: Arrays | None
    lengths: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    seen: np.ndarray
    notes: dict[str, str]


def write_state(
    path: str | os.PathLike[str], config: Config, state: StoredState, *, force: bool = False
) -> None:
    """Writes a state file: whole, or not at all.

    Raises:
      ValueError: The notes are not strings.
      DestinationError: `path` exists and `force` is not set, or cannot be written.
    """
    if not _is_notes(state.notes):
        raise UserError(f"notes must be strings by name, got {state.notes!r}")
    tensors = {
        f"{block}.{field}": value
        for block, fields in (state.arrays or {}).items()
        for field, value in fields.items()
    }
    tensors["seen"] = np.packbits(state.seen, axis=1)  # last: its odd size would misalign others
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(config.to_dict()),
        "lengths": json.dumps(state.lengths),
        "pending": json.dumps(state.pending),
        "notes": json.dumps(state.notes),
    }
    with whole_file(path, force=force) as temporary:
        write_tensors(temporary, tensors, header)


def read_state(path: str | os.PathLike[str], config: Config) -> StoredState:
    """Reads a state file.

    Raises:
      StateError: It is not a complete state file, or is of another model; every difference and
        every field with an impossible value is named.
      OSError: It cannot be read.
    """
    try:
        file = TensorFile(expanded(path))
        # Copies: a view would change, or crash the process, if somebody wrote to the file.
        tensors = {name: np.array(file.read(name)) for name in file.tensors}
        header = file.metadata
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


def _problems(config: Config, stored: StoredState) -> Iterator[str]:
    """Every fault of a state as it was read, in which `seen` is packed."""
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
        yield f"seen must be U8 of shape {shape}, got {DTYPE_NAMES[packed.dtype]} of {packed.shape}"
    if arrays is None:
        if any(lengths):
            yield f"lengths is {_shortened(lengths)}, but there are no arrays"
        return
    try:
        check_state(config, arrays, len(lengths))
    except ValueError as error:
        yield str(error)
        return
    for spec in state_spec(config):
        block, _, field = spec.path.rpartition(".")
        value = arrays[block][field]
        dtype, allowed = DTYPE_NAMES[value.dtype], ["I32"] if spec.dtype == "int32" else _FLOATS
        if field == "num_tokens" and (dtype != "I32" or value.tolist() != lengths):
            came = _shortened(value.tolist())
            yield f"{spec.path} must be I32 and lengths, {lengths}, got {dtype} and {came}"
        elif dtype not in allowed:
            yield f"{spec.path} must be one of {', '.join(allowed)}, got {dtype}"
        elif count := count_nonfinite(value):
            yield f"{spec.path} must be finite, got {count} values that are not"


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


def _require_same_model(path: str | os.PathLike[str], stored: Any, config: Config) -> None:
    try:
        differences = config_from_dict(stored).differences(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path}: its config is damaged: {_shortened(error)}") from error
    if differences:
        listed = (f"{n} is {one!r}, the model has {own!r}" for n, (one, own) in differences.items())
        raise StateError(f"{path} is the state of another model: {'; '.join(listed)}")
