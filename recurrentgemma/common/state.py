"""The state of a model as plain arrays: what both twins export, import and check alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.layer_spec import CONV1D_WIDTH
from recurrentgemma.common.presets import TemporalBlockType

Arrays = Mapping[str, Mapping[str, np.ndarray]]


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
    batch_sizes = {shape[0] for shape in actual.values() if shape}
    if len(batch_sizes) > 1 or (batch_size is not None and batch_sizes - {batch_size}):
        wanted = "one batch size" if batch_size is None else f"batch size {batch_size}"
        came = sorted(batch_sizes) if len(batch_sizes) > 1 else batch_sizes.pop()
        problems.append(f"{wanted} expected, got {came}")
    if problems:
        raise ValueError("this is not the state of such a model:\n  " + "\n  ".join(problems))
