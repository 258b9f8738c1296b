"""The state of a model: what it has read, and the plain arrays that both twins exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import state_spec
from recurrentgemma.common.model.mixers import CAPACITY_BLOCK, Mixer
from recurrentgemma.common.model.params import StateSpec

Arrays = Mapping[str, Mapping[str, np.ndarray]]


class StateError(UserError):
    """A state that cannot be used: of another model, not whole, or no state at all."""


class CapacityError(StateError):
    """A state that grows with the text has no room left."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class State:
    """Where a text stands, to be continued any number of times: nothing changes it.

    What was read last is kept as tokens, one at least, since whoever continues needs the logits
    after them.

    Attributes:
      config: The model that it is a state of.
      cache: The model's state after `lengths` tokens of each row; None before the first.
      lengths: How many tokens of each row `cache` holds.
      pending: The tokens of each row that follow.
      seen: Which tokens occur in each row so far, [B, V], for the repetition penalty.
    """

    config: Config
    cache: Any
    lengths: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    seen: np.ndarray

    def __repr__(self) -> str:
        return f"State(rows={self.num_rows}, tokens={self.num_tokens}, bytes={self.nbytes})"

    @property
    def num_rows(self) -> int:
        """Number of texts, B."""
        return len(self.pending)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """The length of each row's text in tokens."""
        pairs = zip(self.lengths, self.pending, strict=True)
        return tuple(length + len(tokens) for length, tokens in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's state."""
        blocks = (self.cache or {}).values()
        return sum(value.nbytes for block in blocks for value in block)

    def extended(self, tokens: Sequence[Sequence[int]]) -> State:
        """The state with tokens added to each row, not yet read."""
        seen = self.seen.copy()
        for row, new in enumerate(tokens):
            seen[row, np.asarray(new, np.int64)] = True
        pairs = zip(self.pending, tokens, strict=True)
        pending = tuple((*old, *new) for old, new in pairs)
        return dataclasses.replace(self, pending=pending, seen=seen)


def empty_state(config: Config, num_rows: int) -> State:
    """The state before the first token."""
    seen = np.zeros((num_rows, config.vocab_size), bool)
    return State(config, None, (0,) * num_rows, ((),) * num_rows, seen)


def init_cache(
    config: Config,
    batch_size: int,
    zeros: Callable[[tuple[int, ...], str], Any],
    capacity: int | None = None,
) -> dict[str, Any]:
    """The model's state before the first token: a mixer's named tuple for each "blocks.N".

    Args:
      config: What the model is.
      batch_size: Number of rows, B.
      zeros: Makes an array from a shape and the `dtype` of a `StateSpec`.
      capacity: Tokens that a growing state has room for; `CAPACITY_BLOCK` if None.
    """
    layers = enumerate(config.model.layers)
    return {
        f"blocks.{i}": init_block(layer.mixer, batch_size, zeros, capacity) for i, layer in layers
    }


def init_block(
    mixer: Mixer,
    batch_size: int,
    zeros: Callable[[tuple[int, ...], str], Any],
    capacity: int | None = None,
) -> Any:
    """The state of one mixer before the first token; see `init_cache`."""
    specs = mixer.state(capacity or CAPACITY_BLOCK)
    return mixer.cache(*(zeros((batch_size, *spec.shape), spec.dtype) for spec in specs))


def to_arrays(cache: Mapping[str, Any], to_array: Callable[[Any], np.ndarray]) -> Arrays:
    """A state as NumPy arrays, which both frameworks read."""
    return {
        block: {field: to_array(value) for field, value in fields._asdict().items()}
        for block, fields in cache.items()
    }


def from_arrays(
    config: Config, arrays: Arrays, make: Callable[[np.ndarray, str], Any]
) -> dict[str, Any]:
    """The inverse of `to_arrays`; `make` takes an array and the `dtype` of its `StateSpec`.

    Raises:
      ValueError: The arrays are not the state of such a model.
    """
    check_state(config, arrays)
    cache = {}
    for i, layer in enumerate(config.model.layers):
        fields = arrays[f"blocks.{i}"]
        specs = layer.mixer.state(CAPACITY_BLOCK)
        cache[f"blocks.{i}"] = layer.mixer.cache(*(make(fields[s.path], s.dtype) for s in specs))
    return cache


def round_capacity(tokens: int) -> int:
    """The least capacity, a multiple of `CAPACITY_BLOCK`, that has room for so many tokens."""
    return max(1, -(-tokens // CAPACITY_BLOCK)) * CAPACITY_BLOCK


def capacity_of(config: Config, cache: Mapping[str, Any]) -> int | None:
    """How many tokens the state has room for; None where its size does not depend on the text."""
    for spec in state_spec(config):
        if spec.grows:
            block, field = spec.path.rsplit(".", 1)
            return getattr(cache[block], field).shape[1 + spec.axes.index("slots")]
    return None


def require_room(capacity: int | None, tokens: int) -> None:
    """Raises `CapacityError` where a state has too little room for the tokens of a document."""
    if capacity is not None and tokens > capacity:
        raise CapacityError(
            f"the state is full: it has room for {capacity} tokens, and the text has {tokens}; "
            "a larger `capacity` in `init_cache` makes room"
        )


def check_state(
    config: Config, arrays: Mapping[str, Any], batch_size: int | None = None
) -> int | None:
    """Raises `ValueError` naming every array that differs from what such a model's state has.

    Returns how many tokens a growing state has room for; None where its size is fixed.

    Args:
      config: What the model is.
      arrays: The state, as arrays of any framework, in mappings or named tuples.
      batch_size: How many rows it must have; any number, the same in all arrays, if None.
    """
    actual = {
        f"{block}.{field}": tuple(value.shape)
        for block, fields in arrays.items()
        for field, value in (fields if isinstance(fields, Mapping) else fields._asdict()).items()
    }
    expected = {spec.path: spec for spec in state_spec(config)}
    problems = [f"missing {name}" for name in expected if name not in actual]
    problems += [f"unexpected {name}" for name in actual if name not in expected]
    problems += [
        f"{name} must have shape [B, {', '.join(map(str, _sizes(spec)))}], got {actual[name]}"
        for name, spec in expected.items()
        if name in actual and not _fits(spec, actual[name])
    ]
    # Compared, and not in a set: a size that is traced has no hash.
    batch_sizes = [shape[0] for shape in actual.values() if shape]
    wanted = batch_sizes[0] if batch_size is None and batch_sizes else batch_size
    if any(size != wanted for size in batch_sizes):
        expected_size = "one batch size" if batch_size is None else f"batch size {batch_size}"
        came = sorted({int(size) for size in batch_sizes})
        problems.append(f"{expected_size} expected, got {came if len(came) > 1 else came[0]}")
    if problems:
        raise UserError("this is not the state of such a model:\n  " + "\n  ".join(problems))
    growing = next((spec for spec in expected.values() if spec.grows), None)
    return None if growing is None else actual[growing.path][1 + growing.axes.index("slots")]


def _sizes(spec: StateSpec) -> list[int | str]:
    pairs = zip(spec.axes, spec.shape, strict=True)
    return ["S" if spec.grows and axis == "slots" else size for axis, size in pairs]


def _fits(spec: StateSpec, shape: tuple[int, ...]) -> bool:
    wanted = _sizes(spec)
    pairs = zip(wanted, shape[1:], strict=False)
    return len(shape) == 1 + len(wanted) and all(want in ("S", size) for want, size in pairs)
