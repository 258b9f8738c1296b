"""The state of a model between two chunks of the same sequences.

The state is canonical: however the tokens were split into chunks, and however much padding came
with them, the same tokens leave the same arrays. Every update is functional.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils._pytree import _register_namedtuple as register_namedtuple

from recurrentgemma.common.model import state
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.mixers import MIXERS
from recurrentgemma.common.model.state import Arrays
from recurrentgemma.torch.runtime.arrays import to_array, to_tensor
from recurrentgemma.torch.runtime.known import has_values
from recurrentgemma.torch.scan import wide_dtype

Hidden = Float[Tensor, "b t d"]
Positions = Int[Tensor, "b t"]
Cache = dict[str, Any]  # of each "blocks.N" its mixer's named tuple


def register_cache(kind: type) -> None:
    """Makes a mixer's named tuple known to `torch.export` and `torch.load`."""
    # The name under which an exported program is saved; not public as yet.
    register_namedtuple(kind, serialized_type_name=f"recurrentgemma.{kind.__name__}")
    torch.serialization.add_safe_globals([kind])


for _mixer in MIXERS.values():
    register_cache(_mixer.cache)


def _dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What the dtypes of a `StateSpec` mean in a model that computes in this dtype."""
    return {"wide": wide_dtype(dtype), "int32": torch.int32, "compute": dtype}


def _zeros(dtype: torch.dtype, device: torch.device | str | None):
    dtypes = _dtypes(dtype)
    return lambda shape, kind: torch.zeros(shape, dtype=dtypes[kind], device=device)


def init_cache(
    config: Config,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    capacity: int | None = None,
) -> Cache:
    """The state of a model before the first token, keyed "blocks.N"."""
    return state.init_cache(config, batch_size, _zeros(dtype, device), capacity)


def empty_block(
    mixer: Any, batch_size: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> Any:
    """The state of one mixer before the first token."""
    return state.init_block(mixer, batch_size, _zeros(dtype, device))


def require_capacity(capacity: int | None, segment_pos: Positions) -> None:
    """Raises `CapacityError` if a growing state is too small; not inside a traced function."""
    if capacity is None or not has_values(segment_pos) or not segment_pos.numel():
        return
    state.require_room(capacity, int(segment_pos.max()) + 1)


def cache_to_numpy(cache: Cache) -> Arrays:
    """The state as NumPy arrays of the same dtypes, which both frameworks read."""
    return state.to_arrays(cache, to_array)


def cache_from_numpy(config: Config, arrays: Arrays, dtype: torch.dtype, device=None) -> Cache:
    """The inverse of `cache_to_numpy`; `ValueError` unless this is such a model's state."""
    dtypes = _dtypes(dtype)

    def make(array: np.ndarray, kind: str) -> Tensor:
        return to_tensor(np.array(array)).to(device, dtypes[kind])

    return state.from_arrays(config, arrays, make)


def prepend_history(
    history: Shaped[Tensor, "b h d"], x: Shaped[Tensor, "b t d"], padding: Int[Tensor, " b"]
) -> Shaped[Tensor, "b h+t d"]:
    """`x` with `history` moved to just before each row's first token.

    In a row with `padding` leading paddings the history takes the places [padding, padding + H) of
    the result, and what comes before is zero.
    """
    joined = torch.cat([history.to(x.dtype), x], 1)
    place = torch.arange(joined.shape[1], device=x.device)
    shift = torch.where(place < history.shape[1] + padding[:, None], padding[:, None], 0)
    source = place - shift
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return torch.where((source >= 0)[..., None], joined[rows, source.clamp(min=0)], 0)


def num_padding(segment_pos: Positions) -> Int[Tensor, " b"]:
    """How many leading positions of each row are padding."""
    return (segment_pos < 0).sum(-1)
