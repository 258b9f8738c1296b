"""The state of a model between two chunks of the same sequences.

The state is canonical: however the tokens were split into chunks, and however much padding came
with them, the same tokens leave the same arrays. Every update is functional.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import core
from jax.export import register_namedtuple_serialization
from jaxtyping import Array, Float, Int, Shaped

from recurrentgemma.common.model import state
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.mixers import MIXERS
from recurrentgemma.common.model.state import Arrays
from recurrentgemma.jax.scan import wide_dtype

Hidden = Float[Array, "b t d"]
Positions = Int[Array, "b t"]
Cache = dict[str, Any]  # of each "blocks.N" its mixer's named tuple


def register_cache(kind: type) -> None:
    """Gives a mixer's named tuple the name under which `jax.export` serialises it."""
    register_namedtuple_serialization(kind, serialized_name=f"recurrentgemma.{kind.__name__}")


for _mixer in MIXERS.values():
    register_cache(_mixer.cache)


def _dtypes(dtype: Dtype) -> dict[str, Any]:
    """What the dtypes of a `StateSpec` mean in a model that computes in this dtype."""
    return {"wide": wide_dtype(dtype), "int32": jnp.int32, "compute": dtype}


def _zeros(dtype: Dtype):
    dtypes = _dtypes(dtype)
    return lambda shape, kind: jnp.zeros(shape, dtypes[kind])


def init_cache(config: Config, batch_size: int, dtype: Dtype, capacity: int | None = None) -> Cache:
    """The state of a model before the first token, keyed "blocks.N"."""
    return state.init_cache(config, batch_size, _zeros(dtype), capacity)


def empty_block(mixer: Any, batch_size: int, dtype: Dtype) -> Any:
    """The state of one mixer before the first token."""
    return state.init_block(mixer, batch_size, _zeros(dtype))


def require_capacity(capacity: int | None, segment_pos: Positions) -> None:
    """Raises `CapacityError` if a growing state is too small; not inside a traced function."""
    if capacity is None or isinstance(segment_pos, core.Tracer) or not segment_pos.size:
        return
    state.require_room(capacity, int(segment_pos.max()) + 1)


def cache_to_numpy(cache: Cache) -> Arrays:
    """The state as NumPy arrays of the same dtypes, which both frameworks read."""
    return state.to_arrays(cache, np.asarray)


def cache_from_numpy(config: Config, arrays: Arrays, dtype: Dtype) -> Cache:
    """The inverse of `cache_to_numpy`; `ValueError` unless this is such a model's state."""
    dtypes = _dtypes(dtype)
    return state.from_arrays(config, arrays, lambda z, kind: jnp.asarray(z, dtypes[kind]))


def prepend_history(
    history: Shaped[Array, "b h d"], x: Shaped[Array, "b t d"], padding: Int[Array, " b"]
) -> Shaped[Array, "b h+t d"]:
    """`x` with `history` moved to just before each row's first token.

    In a row with `padding` leading paddings the history takes the places [padding, padding + H) of
    the result, and what comes before is zero.
    """
    joined = jnp.concatenate([history.astype(x.dtype), x], 1)
    place = jnp.arange(joined.shape[1])
    shift = jnp.where(place < history.shape[1] + padding[:, None], padding[:, None], 0)
    source = place - shift
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.where((source >= 0)[..., None], joined[rows, source.clip(min=0)], 0)


def num_padding(segment_pos: Positions) -> Int[Array, " b"]:
    """How many leading positions of each row are padding."""
    return (segment_pos < 0).sum(-1)
