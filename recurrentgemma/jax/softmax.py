"""Softmax attention in blocks: memory grows with T, never with T squared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recurrentgemma.common.model.mixers import Attention
from recurrentgemma.jax.scan import wide_dtype

BLOCKS_PER_WINDOW = 4
BLOCK = 128  # queries that share an array of scores
SPANS = 4  # groups of blocks, a loop each: more groups skip more keys, but compile for longer


def attend(
    q_btnh: Float[Array, "b t n h"],
    kv_bskh: Float[Array, "b s kv hh"],
    document_bt: Int[Array, "b t"],
    document_bs: Int[Array, "b s"],
    mixer: Attention,
) -> Float[Array, "b t n h"]:
    """Attention of T queries over S = P + T places, P of them history (0 or the cache's slots).

    The query at place P + t sees places P + t - reach to P + t, those of its own document. Key and
    value stand side by side in the last axis of `kv_bskh`. The sequence goes in blocks of a
    fraction of the reach, each against its own keys and those of the blocks that the reach covers;
    without a limit of the reach in blocks against all keys.
    """
    if mixer.reach is None:
        return attend_all(q_btnh, kv_bskh, document_bt, document_bs, mixer)
    length, history, reach = q_btnh.shape[1], kv_bskh.shape[1] - q_btnh.shape[1], mixer.reach
    block = -(-reach // BLOCKS_PER_WINDOW)
    covered = block * BLOCKS_PER_WINDOW
    if history + length <= covered + block:  # no more keys than a block sees
        q_bgcnh, document_bgc = q_btnh[:, None], document_bt[:, None]
        kv_bgskh, document_bgs = kv_bskh[:, None], document_bs[:, None]
    else:
        before, number = covered - history, (length + block - 1) // block
        q_bgcnh = _blocks(q_btnh, 0, number, block)
        document_bgc = _blocks(document_bt, 0, number, block)
        number += BLOCKS_PER_WINDOW
        kv_bgskh = _and_previous(_blocks(kv_bskh, before, number, block))
        document_bgs = _and_previous(_blocks(document_bs, before, number, block))
        history = covered
    lag_cs = _lags(history, q_bgcnh.shape[2], kv_bgskh.shape[2])
    mask_bgcs = (lag_cs >= 0) & (lag_cs <= reach)
    mask_bgcs = mask_bgcs & (document_bgc[..., None] == document_bgs[..., None, :])
    k_bgskh, v_bgskh = jnp.split(kv_bgskh, 2, -1)
    encoded = attend_masked(q_bgcnh, k_bgskh, v_bgskh, mask_bgcs, mixer)
    places = encoded.shape[1] * encoded.shape[2]
    return encoded.reshape(encoded.shape[0], places, *encoded.shape[3:])[:, :length]


def attend_all(
    q_btnh: Float[Array, "b t n h"],
    kv_bskh: Float[Array, "b s kv hh"],
    document_bt: Int[Array, "b t"],
    document_bs: Int[Array, "b s"],
    mixer: Attention,
) -> Float[Array, "b t n h"]:
    """Attention of T queries over S = P + T places, P of them history.

    The query at place P + t sees places 0 to P + t, those of its own document. Key and value stand
    side by side in the last axis of `kv_bskh`. No array has T x S elements: queries go in blocks,
    each against the keys up to the last of its span, and the backward pass computes each again.
    """
    length, history = q_btnh.shape[1], kv_bskh.shape[1] - q_btnh.shape[1]
    span, encoded = BLOCK * -(-length // (SPANS * BLOCK)), []
    for start in range(0, length, span):
        queries, keys = slice(start, start + span), slice(history + start + span)

        def block(args, kv_bskh=kv_bskh[:, keys], document_bs=document_bs[:, keys]):
            q_bcnh, document_bc, before = args
            lag_cs = _lags(before, q_bcnh.shape[1], kv_bskh.shape[1])
            mask_bcs = (lag_cs >= 0) & (document_bc[..., None] == document_bs[:, None])
            k_bskh, v_bskh = jnp.split(kv_bskh, 2, -1)
            return attend_masked(q_bcnh, k_bskh, v_bskh, mask_bcs, mixer)

        args = q_btnh[:, queries], document_bt[:, queries]
        if length <= BLOCK:
            return block((*args, history))
        before_g = jnp.arange(history + start, history + min(start + span, length), BLOCK)
        blocks = (_blocks(z, 0, len(before_g), BLOCK).swapaxes(0, 1) for z in args)
        args = (*blocks, before_g)
        encoded_gbcnh = jax.lax.map(jax.checkpoint(block, prevent_cse=False), args)
        encoded_bgcnh = encoded_gbcnh.swapaxes(0, 1)
        encoded.append(encoded_bgcnh.reshape(q_btnh.shape[0], -1, *q_btnh.shape[2:]))
    return jnp.concatenate(encoded, 1)[:, :length]


def attend_masked(
    q_zcnh: Float[Array, "*z c n h"],
    k_zskh: Float[Array, "*z s kv h"],
    v_zskh: Float[Array, "*z s kv h"],
    mask_zcs: Bool[Array, "*z c s"],
    mixer: Attention,
) -> Float[Array, "*z c n h"]:
    """softmax(soft_cap(scale * q @ k^T)) @ v in float32; R query heads share a key head."""
    wide = wide_dtype(q_zcnh.dtype)
    groups = (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)
    q_zckrh = q_zcnh.reshape(*q_zcnh.shape[:-2], *groups)
    # Heads that share a key head stand beside queries, so both products are plain matrix products.
    if q_zcnh.shape[-3] == 1:  # keys first: else XLA turns them around, in a copy
        scores_zkscr = jnp.einsum(
            "...skh,...ckrh->...kscr", k_zskh, q_zckrh, preferred_element_type=wide
        )
        scores_zkcrs = jnp.moveaxis(scores_zkscr, -3, -1)
    else:
        scores_zkcrs = jnp.einsum(
            "...ckrh,...skh->...kcrs", q_zckrh, k_zskh, preferred_element_type=wide
        )
    scores_zkcrs = _capped(scores_zkcrs, mixer)
    mask_z1c1s = mask_zcs[..., None, :, None, :]
    scores_zkcrs = jnp.where(mask_z1c1s, scores_zkcrs, jnp.finfo(wide).min)
    largest_zkcr1 = jax.lax.stop_gradient(scores_zkcrs.max(-1, keepdims=True))
    weights_zkcrs = jnp.exp(scores_zkcrs - largest_zkcr1)
    out_zkcrh = jnp.einsum(
        "...kcrs,...skh->...kcrh",
        weights_zkcrs.astype(v_zskh.dtype),
        v_zskh,
        preferred_element_type=wide,
    )
    out_zkcrh = (out_zkcrh / weights_zkcrs.sum(-1, keepdims=True)).astype(q_zcnh.dtype)
    return out_zkcrh.swapaxes(-4, -3).reshape(q_zcnh.shape)


def attend_also(
    q_b1nh: Float[Array, "b 1 n h"],
    k_bskh: Float[Array, "b s kv h"],
    v_bskh: Float[Array, "b s kv h"],
    k_b1kh: Float[Array, "b 1 kv h"],
    v_b1kh: Float[Array, "b 1 kv h"],
    sees_bs: Bool[Array, "b s"],
    sees_b1: Bool[Array, "b 1"],
    mixer: Attention,
) -> Float[Array, "b 1 n h"]:
    """Attention of one query over S keys and one more; none of the S is copied."""
    wide = wide_dtype(q_b1nh.dtype)
    groups = (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)
    q_bkrh = q_b1nh.reshape(q_b1nh.shape[0], *groups)
    scores = []
    for keys, sees in ((k_bskh, sees_bs), (k_b1kh, sees_b1)):
        # Keys first: else XLA turns them around, in a copy.
        z_bksr = jnp.einsum("bskh,bkrh->bksr", keys, q_bkrh, preferred_element_type=wide)
        hidden = ~sees[:, None, :, None]
        scores.append(jnp.where(hidden, jnp.finfo(wide).min, _capped(z_bksr, mixer)))
    largest_bk1r = jax.lax.stop_gradient(
        jnp.maximum(*(z_bksr.max(2, keepdims=True) for z_bksr in scores))
    )
    weights = [jnp.exp(z_bksr - largest_bk1r) for z_bksr in scores]
    out_bkrh = sum(
        jnp.einsum(
            "bksr,bskh->bkrh", w_bksr.astype(z_bskh.dtype), z_bskh, preferred_element_type=wide
        )
        for w_bksr, z_bskh in zip(weights, (v_bskh, v_b1kh), strict=True)
    )
    total_bkr = weights[0].sum(2) + weights[1][:, :, 0]
    return (out_bkrh / total_bkr[..., None]).astype(q_bkrh.dtype).reshape(q_b1nh.shape)


def _capped(products: Array, mixer: Attention) -> Array:
    """soft_cap(scale * products)."""
    scores = products * mixer.scale
    if mixer.soft_cap:
        scores = jnp.tanh(scores / mixer.soft_cap) * mixer.soft_cap
    return scores


def _lags(before: int | Int[Array, ""], queries: int, keys: int) -> Int[Array, "c s"]:
    """How many places each key is before each query; `before` places precede the first query."""
    query = before + jnp.arange(queries)
    return query[:, None] - jnp.arange(keys)


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
