"""The state of a Griffin model between two chunks of the same sequences.

The state is canonical: however the tokens were split into chunks, and however much padding came
with them, the same tokens leave the same arrays. Every update is functional.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.export import register_namedtuple_serialization
from jaxtyping import Array, Float, Int, Shaped

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import CONV1D_WIDTH
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.common.model.state import Arrays, check_state
from recurrentgemma.jax.scan import wide_dtype


class RecurrentBlockCache(NamedTuple):
    """The state of a recurrent block.

    Attributes:
      rg_lru_state: h of the RG-LRU, float32 or wider.
      conv1d_state: The last inputs of the convolution in the current document, oldest first, zeros
        where the document has had fewer.
    """

    rg_lru_state: Float[Array, "b l"]
    conv1d_state: Float[Array, "b 3 l"]


class AttentionBlockCache(NamedTuple):
    """The state of a local attention block: a ring over the current document's last W tokens.

    Attributes:
      keys: Rotated keys; the token at position p of its document is at slot p mod W, zeros where
        there is none.
      values: Values, in the same slots.
      num_tokens: How many tokens of the current document have been seen.
    """

    keys: Float[Array, "b w 1 h"]
    values: Float[Array, "b w 1 h"]
    num_tokens: Int[Array, " b"]


for _kind in (RecurrentBlockCache, AttentionBlockCache):
    # What a program that `jax.export` makes names them when it is serialised.
    register_namedtuple_serialization(_kind, serialized_name=f"recurrentgemma.{_kind.__name__}")

ResidualBlockCache = RecurrentBlockCache | AttentionBlockCache
Cache = dict[str, ResidualBlockCache]


def init_block_cache(
    config: GriffinConfig,
    block_type: TemporalBlockType,
    batch_size: int,
    dtype: Dtype,
) -> ResidualBlockCache:
    """The state of one block before the first token: zeros."""

    def zeros(*shape: int, dtype: Dtype = dtype) -> Array:
        return jnp.zeros((batch_size, *shape), dtype)

    if block_type is TemporalBlockType.RECURRENT:
        return RecurrentBlockCache(
            rg_lru_state=zeros(config.lru_width, dtype=wide_dtype(dtype)),
            conv1d_state=zeros(CONV1D_WIDTH - 1, config.lru_width),
        )
    kv_shape = (config.attention_window_size, 1, config.head_dim)
    return AttentionBlockCache(zeros(*kv_shape), zeros(*kv_shape), zeros(dtype=jnp.int32))


def init_cache(config: GriffinConfig, batch_size: int, dtype: Dtype) -> Cache:
    """The state of a model before the first token, keyed "blocks.N"."""
    return {
        f"blocks.{i}": init_block_cache(config, block_type, batch_size, dtype)
        for i, block_type in enumerate(config.block_types)
    }


def cache_to_numpy(cache: Cache) -> dict[str, dict[str, np.ndarray]]:
    """The state as NumPy arrays of the same dtypes, which both frameworks read."""
    return {
        block: {field: np.asarray(value) for field, value in block_cache._asdict().items()}
        for block, block_cache in cache.items()
    }


def cache_from_numpy(
    config: GriffinConfig,
    arrays: Arrays,
    dtype: Dtype,
) -> Cache:
    """The inverse of `cache_to_numpy`.

    Raises:
      ValueError: The arrays are not the state of such a model.
    """
    check_state(config, arrays)
    cache = {}
    for block, empty in init_cache(config, 1, dtype).items():
        cache[block] = type(empty)(
            **{
                field: jnp.asarray(arrays[block][field], like.dtype)
                for field, like in empty._asdict().items()
            }
        )
    return cache


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


def num_padding(segment_pos: Int[Array, "b t"]) -> Int[Array, " b"]:
    """How many leading positions of each row are padding."""
    return (segment_pos < 0).sum(-1)
