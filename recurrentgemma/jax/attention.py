"""Local multi-query attention in blocks: memory grows with T, never with T squared."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.jax.cache import (
    AttentionBlockCache,
    init_block_cache,
    num_padding,
    prepend_history,
)
from recurrentgemma.jax.layers import SpecModule
from recurrentgemma.jax.scan import as_positions, wide_dtype

MAX_WAVELENGTH = 10_000
BLOCKS_PER_WINDOW = 4


def apply_rope(x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
    """Rotary embedding of the first half of each head; the second half passes through.

    The rotated half is itself split in two, (x1 cos - x2 sin, x2 cos + x1 sin), in float32.
    """
    rotated, passed = jnp.split(x, 2, -1)
    half = rotated.shape[-1] // 2
    wide = wide_dtype(x.dtype)
    exponent = jnp.arange(half, dtype=wide) / half
    angle = positions[..., None, None] * jnp.asarray(MAX_WAVELENGTH, wide) ** -exponent
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(rotated.astype(wide), 2, -1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), passed], -1)


def local_attention(
    q_btnh: Float[Array, "b t n h"],
    kv_bsh: Float[Array, "b s hh"],
    document_bt: Int[Array, "b t"],
    document_bs: Int[Array, "b s"],
    window: int,
) -> Float[Array, "b t n h"]:
    """Attention of T queries over S = H + T places, H of them history (0 or `window`).

    The query at place H + t sees places H + t - window to H + t, those of its own document. The
    sequence goes in blocks of a fraction of the window, each against its own keys and those of the
    blocks that the window reaches.

    Args:
      q_btnh: Queries.
      kv_bsh: Key and value, side by side in the last axis.
      document_bt: Which document each query belongs to.
      document_bs: Which document each key belongs to.
      window: How many places before its own a query sees.
    """
    length, history = q_btnh.shape[1], kv_bsh.shape[1] - q_btnh.shape[1]
    block = -(-window // BLOCKS_PER_WINDOW)
    reach = block * BLOCKS_PER_WINDOW
    if history + length <= reach + block:  # no more keys than a block sees
        q_bgcnh, document_bgc = q_btnh[:, None], document_bt[:, None]
        kv_bgsh, document_bgs = kv_bsh[:, None], document_bs[:, None]
    else:
        before, number = reach - history, (length + block - 1) // block
        q_bgcnh = _blocks(q_btnh, 0, number, block)
        document_bgc = _blocks(document_bt, 0, number, block)
        number += BLOCKS_PER_WINDOW
        kv_bgsh = _and_previous(_blocks(kv_bsh, before, number, block))
        document_bgs = _and_previous(_blocks(document_bs, before, number, block))
        history = reach
    lag_cs = history + jnp.arange(q_bgcnh.shape[2])[:, None] - jnp.arange(kv_bgsh.shape[2])
    mask_bgcs = (lag_cs >= 0) & (lag_cs <= window)
    mask_bgcs = mask_bgcs & (document_bgc[..., None] == document_bgs[..., None, :])
    k_bgsh, v_bgsh = jnp.split(kv_bgsh, 2, -1)
    encoded = _attend(q_bgcnh, k_bgsh, v_bgsh, mask_bgcs)
    places = encoded.shape[1] * encoded.shape[2]
    return encoded.reshape(encoded.shape[0], places, *encoded.shape[3:])[:, :length]


def _attend(
    q_bgcnh: Float[Array, "b g c n h"],
    k_bgsh: Float[Array, "b g s h"],
    v_bgsh: Float[Array, "b g s h"],
    mask_bgcs: Bool[Array, "b g c s"],
) -> Float[Array, "b g c n h"]:
    """Multi-query attention in each of G blocks, its softmax in float32."""
    wide = wide_dtype(q_bgcnh.dtype)
    # Heads beside queries: they share their keys, so that both products are plain ones of matrices.
    logits_bgcns = jnp.einsum("bgcnh,bgsh->bgcns", q_bgcnh, k_bgsh, preferred_element_type=wide)
    logits_bgcns = logits_bgcns * q_bgcnh.shape[-1] ** -0.5
    logits_bgcns = jnp.where(mask_bgcs[:, :, :, None], logits_bgcns, jnp.finfo(wide).min)
    largest_bgcn1 = jax.lax.stop_gradient(logits_bgcns.max(-1, keepdims=True))
    weights_bgcns = jnp.exp(logits_bgcns - largest_bgcn1)
    out_bgcnh = jnp.einsum(
        "bgcns,bgsh->bgcnh",
        weights_bgcns.astype(v_bgsh.dtype),
        v_bgsh,
        preferred_element_type=wide,
    )
    return (out_bgcnh / weights_bgcns.sum(-1, keepdims=True)).astype(q_bgcnh.dtype)


def _blocks(x: Array, before: int, number: int, length: int) -> Array:
    """[B, T, ...] to [B, number, length, ...], T padded with zeros (no document)."""
    no_document = 0 if jnp.issubdtype(x.dtype, jnp.floating) else -1
    after = number * length - before - x.shape[1]
    padding = ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))
    padded = jnp.pad(x, padding, constant_values=no_document)
    return padded.reshape(x.shape[0], number, length, *x.shape[2:])


def _and_previous(blocks: Array) -> Array:
    """[B, R + G, C, ...] to [B, G, (R + 1) C, ...]: each block but the first R, behind R others."""
    last = blocks.shape[1] - BLOCKS_PER_WINDOW
    shifted = (blocks[:, i : i + last] for i in range(BLOCKS_PER_WINDOW + 1))
    return jnp.concatenate(list(shifted), 2)


class LocalAttentionBlock(SpecModule):
    """Multi-query attention in which a token sees itself and the W tokens before it."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_pos: Int[Array, "b t"],
        cache: AttentionBlockCache | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionBlockCache]:
        """Returns the outputs and the state after them."""
        segment_pos = as_positions(segment_pos, x)
        q_btd, k_bth, v_bth = (self.linear(f"proj_{name}")(x) for name in "qkv")
        q_btnh = q_btd.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q_btnh = apply_rope(q_btnh, segment_pos)
        k_bth = apply_rope(k_bth[..., None, :], segment_pos)[..., 0, :]
        if not x.shape[1]:  # nothing happens to the state
            kind = TemporalBlockType.ATTENTION
            empty: Any = init_block_cache(self.config, kind, x.shape[0], v_bth.dtype)
            encoded, new_cache = q_btnh, cache or empty
        elif cache is not None and x.shape[1] == 1:
            encoded, new_cache = _step(q_btnh, k_bth, v_bth, segment_pos, cache)
        else:
            kv_bth = jnp.concatenate([k_bth, v_bth], -1)
            encoded, new_cache = self._chunk(q_btnh, kv_bth, segment_pos, cache)
        return self.linear("proj_final")(encoded.reshape(q_btd.shape)), new_cache

    def _chunk(
        self,
        q_btnh: Float[Array, "b t n h"],
        kv_bth: Float[Array, "b t hh"],
        segment_pos: Int[Array, "b t"],
        cache: AttentionBlockCache | None,
    ) -> tuple[Float[Array, "b t n h"], AttentionBlockCache]:
        document = jnp.where(segment_pos < 0, -1, (segment_pos == 0).cumsum(-1))
        window = self.config.attention_window_size
        if cache is None:
            kv_bsh, document_bs = kv_bth, document
        else:
            padding = num_padding(segment_pos)
            kv_bwh, document_bw = _history(cache, segment_pos, padding)
            kv_bsh = prepend_history(kv_bwh, kv_bth, padding)
            # Shifted by one, so that the zeros before the history mean no document.
            document_bs = prepend_history(
                document_bw[..., None] + 1, document[..., None] + 1, padding
            )[..., 0] - 1  # fmt: skip
        encoded = local_attention(q_btnh, kv_bsh, document, document_bs, window)
        return encoded, _new_cache(cache, kv_bth, segment_pos, window)


def _step(
    q_b1nh: Float[Array, "b 1 n h"],
    k_b1h: Float[Array, "b 1 h"],
    v_b1h: Float[Array, "b 1 h"],
    segment_pos: Int[Array, "b 1"],
    cache: AttentionBlockCache,
) -> tuple[Float[Array, "b 1 n h"], AttentionBlockCache]:
    """One token a row, against the ring as it lies: what a chunk of one token would give."""
    window = cache.keys.shape[1]
    starts, is_token = segment_pos == 0, segment_pos >= 0
    num_before = jnp.where(starts, 0, cache.num_tokens[:, None])
    slot = jnp.arange(window)
    between = (segment_pos - slot - 1) % window  # tokens since the one in the slot
    sees_bs = jnp.pad(between < num_before, ((0, 0), (0, 1)), constant_values=True)
    replaced = ((between == window - 1) & is_token)[..., None, None]
    starts = starts[..., None, None]

    (keys, ring_of_keys), (values, ring_of_values) = (
        _extended_and_replaced(ring.astype(new.dtype), new[:, None], starts, replaced)
        for ring, new in ((cache.keys, k_b1h), (cache.values, v_b1h))
    )
    encoded = _attend(q_b1nh[:, None], keys, values, sees_bs[:, None, None])[:, 0]
    num_tokens = (num_before + is_token)[:, 0]
    return encoded, AttentionBlockCache(ring_of_keys, ring_of_values, num_tokens)


def _extended_and_replaced(
    ring_bw1h: Array, new_b11h: Array, starts: Array, replaced: Array
) -> tuple[Array, Array]:
    """What one token sees, [B, 1, W + 1, H], and the ring after it."""
    seen = jnp.concatenate([ring_bw1h, new_b11h], 1).swapaxes(1, 2)
    return seen, jnp.where(replaced, new_b11h, jnp.where(starts, 0, ring_bw1h))


def _history(
    cache: AttentionBlockCache, segment_pos: Int[Array, "b t"], padding: Int[Array, " b"]
) -> tuple[Float[Array, "b w hh"], Int[Array, "b w"]]:
    """The ring in order of time, and its documents: 0, which a continued document has, or none."""
    window = cache.keys.shape[1]
    last = segment_pos.shape[1] - 1
    first_pos = jnp.take_along_axis(segment_pos, padding.clip(max=last)[:, None], 1)
    age = jnp.arange(window, 0, -1)
    slot = (first_pos - age) % window
    rows = jnp.arange(slot.shape[0])[:, None]
    kv = jnp.concatenate([cache.keys[:, :, 0], cache.values[:, :, 0]], -1)[rows, slot]
    return kv, jnp.where(age <= cache.num_tokens[:, None], 0, -1)


def _new_cache(
    cache: AttentionBlockCache | None,
    kv_bth: Float[Array, "b t hh"],
    segment_pos: Int[Array, "b t"],
    window: int,
) -> AttentionBlockCache:
    """The ring after a chunk: per slot the newest token of the last document, else as it was."""
    length, last_pos = segment_pos.shape[1], segment_pos[:, -1]
    starts = (segment_pos == 0).any(-1)
    num_new = length - num_padding(segment_pos)
    num_new = jnp.where(starts, jnp.minimum(num_new - 1, last_pos) + 1, num_new)
    age = (last_pos[:, None] - jnp.arange(window)) % window
    rows = jnp.arange(age.shape[0])[:, None]
    newest = kv_bth[rows, (length - 1 - age).clip(min=0)]
    if cache is None:
        kept, num_tokens = jnp.zeros_like(newest), num_new
    else:
        kept = jnp.concatenate([cache.keys[:, :, 0], cache.values[:, :, 0]], -1)
        kept = jnp.where(starts[:, None, None], 0, kept.astype(newest.dtype))
        num_tokens = jnp.where(starts, num_new, cache.num_tokens + num_new)
    kv = jnp.where((age < num_new[:, None])[..., None], newest, kept)
    keys, values = jnp.split(kv[:, :, None], 2, -1)
    return AttentionBlockCache(keys, values, num_tokens.astype(jnp.int32))
