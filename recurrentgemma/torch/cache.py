"""The state of a Griffin model between two chunks of the same sequences.

The state is canonical: however the tokens were split into chunks, and however much padding came
with them, the same tokens leave the same arrays. Every update is functional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils._pytree import _register_namedtuple as register_namedtuple

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import CONV1D_WIDTH
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.common.model.state import Arrays, check_state
from recurrentgemma.torch.scan import wide_dtype


class RecurrentBlockCache(NamedTuple):
    """The state of a recurrent block.

    Attributes:
      rg_lru_state: h of the RG-LRU, float32 or wider.
      conv1d_state: The last inputs of the convolution in the current document, oldest first, zeros
        where the document has had fewer.
    """

    rg_lru_state: Float[Tensor, "b l"]
    conv1d_state: Float[Tensor, "b 3 l"]


class AttentionBlockCache(NamedTuple):
    """The state of a local attention block: a ring over the current document's last W tokens.

    Attributes:
      keys: Rotated keys; the token at position p of its document is at slot p mod W, zeros where
        there is none.
      values: Values, in the same slots.
      num_tokens: How many tokens of the current document have been seen.
    """

    keys: Float[Tensor, "b w 1 h"]
    values: Float[Tensor, "b w 1 h"]
    num_tokens: Int[Tensor, " b"]


for _kind in (RecurrentBlockCache, AttentionBlockCache):
    # What a program that `torch.export` makes names them when it is saved; not public as yet.
    register_namedtuple(_kind, serialized_type_name=f"recurrentgemma.{_kind.__name__}")
    torch.serialization.add_safe_globals([_kind])

ResidualBlockCache = RecurrentBlockCache | AttentionBlockCache
Cache = dict[str, ResidualBlockCache]


def init_block_cache(
    config: GriffinConfig,
    block_type: TemporalBlockType,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> ResidualBlockCache:
    """The state of one block before the first token: zeros."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

    if block_type is TemporalBlockType.RECURRENT:
        return RecurrentBlockCache(
            rg_lru_state=zeros(config.lru_width, dtype=wide_dtype(dtype)),
            conv1d_state=zeros(CONV1D_WIDTH - 1, config.lru_width),
        )
    kv_shape = (config.attention_window_size, 1, config.head_dim)
    return AttentionBlockCache(zeros(*kv_shape), zeros(*kv_shape), zeros(dtype=torch.int32))


def init_cache(
    config: GriffinConfig,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Cache:
    """The state of a model before the first token, keyed "blocks.N"."""
    return {
        f"blocks.{i}": init_block_cache(config, block_type, batch_size, dtype, device)
        for i, block_type in enumerate(config.block_types)
    }


def cache_to_numpy(cache: Cache) -> dict[str, dict[str, np.ndarray]]:
    """The state as NumPy arrays (bfloat16 as float32), in the form both frameworks read."""
    return {
        block: {
            field: _without_bfloat16(value.detach()).cpu().numpy()
            for field, value in block_cache._asdict().items()
        }
        for block, block_cache in cache.items()
    }


def _without_bfloat16(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def cache_from_numpy(
    config: GriffinConfig,
    arrays: Arrays,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Cache:
    """The inverse of `cache_to_numpy`.

    Raises:
      ValueError: The arrays are not the state of such a model.
    """
    check_state(config, arrays)
    cache = {}
    for block, empty in init_cache(config, 1, dtype, "meta").items():
        cache[block] = type(empty)(
            **{
                field: torch.tensor(arrays[block][field], dtype=like.dtype, device=device)
                for field, like in empty._asdict().items()
            }
        )
    return cache


def map_cache(function: Callable[..., Tensor], cache: Any, *others: Any) -> Any:
    """The results of a function for each array of caches, or for single arrays."""
    if isinstance(cache, Tensor):
        return function(cache, *others)
    return {
        name: type(block)(*map(function, block, *(other[name] for other in others)))
        for name, block in cache.items()
    }


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


def num_padding(segment_pos: Int[Tensor, "b t"]) -> Int[Tensor, " b"]:
    """How many leading positions of each row are padding."""
    return (segment_pos < 0).sum(-1)
