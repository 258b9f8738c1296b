"""Softmax attention: under a mask, and over all earlier keys in blocks of queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recurrentgemma.common.model.mixers import Attention
from recurrentgemma.jax.scan import wide_dtype

BLOCK = 128  # queries that share an array of scores
SPANS = 4  # groups of blocks, a loop each: more groups skip more keys, but compile for longer


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
        args = (*(_blocks(z, len(before_g)) for z in args), before_g)
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
    scores_zkcrs = scores_zkcrs * mixer.scale
    if mixer.soft_cap:
        scores_zkcrs = jnp.tanh(scores_zkcrs / mixer.soft_cap) * mixer.soft_cap
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


def _lags(before: int | Int[Array, ""], queries: int, keys: int) -> Int[Array, "c s"]:
    """How many places each key is before each query; `before` places precede the first query."""
    query = before + jnp.arange(queries)
    return query[:, None] - jnp.arange(keys)


def _blocks(x: Array, number: int) -> Array:
    """[B, T, ...] to [number, B, BLOCK, ...], T padded with zeros."""
    after = number * BLOCK - x.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, after), *((0, 0),) * (x.ndim - 2)))
    return padded.reshape(x.shape[0], number, BLOCK, *x.shape[2:]).swapaxes(0, 1)
