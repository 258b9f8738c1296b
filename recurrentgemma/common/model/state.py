"""The state of a model: what it has read, and the plain arrays that both twins exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import CONV1D_WIDTH
from recurrentgemma.common.model.presets import TemporalBlockType

Arrays = Mapping[str, Mapping[str, np.ndarray]]


class StateError(ValueError):
    """A state that cannot be used: of another model, not whole, or no state at all."""


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Where a text stands, to be continued any number of times: nothing changes it.

    Its size does not depend on the length of the text. What was read last is kept as tokens, one at
    least, since whoever continues needs what the model says after them.

    Attributes:
      config: The model that it is a state of.
      cache: The model's state after `lengths` tokens of each row; None before the first.
      lengths: How many tokens of each row `cache` holds.
      pending: The tokens of each row that follow.
      seen: Which tokens occur in each row so far, [B, V], for the repetition penalty.
    """

    config: GriffinConfig
    cache: Any
    lengths: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    seen: np.ndarray

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


def empty_state(config: GriffinConfig, num_rows: int) -> State:
    """The state before the first token."""
    seen = np.zeros((num_rows, config.vocab_size), bool)
    return State(config, None, (0,) * num_rows, ((),) * num_rows, seen)


def state_shapes(config: GriffinConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every array of the state without its batch axis, by "blocks.N.field"."""
    kv_shape = (config.attention_window_size, 1, config.head_dim)
    fields: dict[TemporalBlockType, dict[str, tuple[int, ...]]] = {
        TemporalBlockType.RECURRENT: {
            "rg_lru_state": (config.lru_width,),
            "conv1d_state": (CONV1D_WIDTH - 1, config.lru_width),
        },
        TemporalBlockType.ATTENTION: {"keys": kv_shape, "values": kv_shape, "num_tokens": ()},
    }
    return {
        f"blocks.{i}.{field}": shape
        for i, block_type in enumerate(config.block_types)
        for field, shape in fields[block_type].items()
    }


def check_state(
    config: GriffinConfig, arrays: Mapping[str, Mapping[str, Any]], batch_size: int | None = None
) -> None:
    """Raises `ValueError` naming every array that is not as such a model's state has it.

    Args:
      config: What the model is.
      arrays: The state, as arrays of any framework.
      batch_size: How many rows it must have; any number, the same in all arrays, if None.
    """
    actual = {
        f"{block}.{field}": tuple(value.shape)
        for block, fields in arrays.items()
        for field, value in fields.items()
    }
    expected = state_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in actual]
    problems += [f"unexpected {name}" for name in actual if name not in expected]
    problems += [
        f"{name} must have shape [B, {', '.join(map(str, shape))}], got {actual[name]}"
        for name, shape in expected.items()
        if name in actual and (not actual[name] or actual[name][1:] != shape)
    ]
    # Compared, and not in a set: a size that is traced has no hash.
    batch_sizes = [shape[0] for shape in actual.values() if shape]
    wanted = batch_sizes[0] if batch_size is None and batch_sizes else batch_size
    if any(size != wanted for size in batch_sizes):
        expected_size = "one batch size" if batch_size is None else f"batch size {batch_size}"
        came = sorted({int(size) for size in batch_sizes})
        problems.append(f"{expected_size} expected, got {came if len(came) > 1 else came[0]}")
    if problems:
        raise ValueError("this is not the state of such a model:\n  " + "\n  ".join(problems))
