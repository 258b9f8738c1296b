"""Softmax attention in blocks: memory grows with T, never with T squared."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurrentgemma.common.model.mixers import Attention
from recurrentgemma.torch.runtime import one_more_key
from recurrentgemma.torch.scan import forward_levels, wide_dtype

BLOCKS_PER_WINDOW = 4
BLOCK = 256  # queries that share an array of scores


def attend(
    q_btnh: Float[Tensor, "b t n h"],
    kv_bskh: Float[Tensor, "b s kv hh"],
    document_bt: Int[Tensor, "b t"],
    document_bs: Int[Tensor, "b s"],
    mixer: Attention,
) -> Float[Tensor, "b t n h"]:
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
    lag_cs = _lags(history, q_bgcnh.shape[2], kv_bgskh.shape[2], q_btnh.device)
    mask_bgcs = (lag_cs >= 0) & (lag_cs <= reach)
    mask_bgcs = mask_bgcs & (document_bgc[..., None] == document_bgs[..., None, :])
    k_zskh, v_zskh = kv_bgskh.flatten(0, 1).chunk(2, -1)
    q_zcnh, mask_zcs = q_bgcnh.flatten(0, 1), mask_bgcs.flatten(0, 1)
    encoded = attend_masked(q_zcnh, k_zskh, v_zskh, mask_zcs, mixer)
    return encoded.unflatten(0, q_bgcnh.shape[:2]).flatten(1, 2)[:, :length]


def attend_all(
    q_btnh: Float[Tensor, "b t n h"],
    kv_bskh: Float[Tensor, "b s kv hh"],
    document_bt: Int[Tensor, "b t"],
    document_bs: Int[Tensor, "b s"],
    mixer: Attention,
) -> Float[Tensor, "b t n h"]:
    """Attention of T queries over S = P + T places, P of them history.

    The query at place P + t sees places 0 to P + t, those of its own document. Key and value stand
    side by side in the last axis of `kv_bskh`. No array has T x S elements: queries go in blocks,
    each against the keys up to its last one, and the backward pass computes each block again.
    """
    length, history = q_btnh.shape[1], kv_bskh.shape[1] - q_btnh.shape[1]
    encoded = []
    for start in range(0, length, BLOCK):
        queries, keys = slice(start, start + BLOCK), slice(history + start + BLOCK)

        def block(q_bcnh, kv_bskh, document_bc, document_bs, before=history + start):
            lag_cs = _lags(before, q_bcnh.shape[1], kv_bskh.shape[1], q_bcnh.device)
            mask_bcs = (lag_cs >= 0) & (document_bc[..., None] == document_bs[:, None])
            k_bskh, v_bskh = kv_bskh.chunk(2, -1)
            return attend_masked(q_bcnh, k_bskh, v_bskh, mask_bcs, mixer)

        args = q_btnh[:, queries], kv_bskh[:, keys], document_bt[:, queries], document_bs[:, keys]
        encoded.append(_recomputed(block, *args) if length > BLOCK else block(*args))
    return torch.cat(encoded, 1)


def attend_masked(
    q_zcnh: Float[Tensor, "z c n h"],
    k_zskh: Float[Tensor, "z s kv h"],
    v_zskh: Float[Tensor, "z s kv h"],
    mask_zcs: Bool[Tensor, "z c s"] | None,
    mixer: Attention,
) -> Float[Tensor, "z c n h"]:
    """softmax(soft_cap(scale * q @ k^T)) @ v in float32; R query heads share a key head.

    Without a mask each query sees all keys.
    """
    function = nn.functional.scaled_dot_product_attention
    k_zksh, v_zksh = k_zskh.transpose(1, 2), v_zskh.transpose(1, 2)
    mask_z1cs = None if mask_zcs is None else mask_zcs[:, None]
    plain = bool(mixer.soft_cap) or forward_levels() > 0  # PyTorch's kernels know neither
    if not plain and q_zcnh.shape[1] > 1:
        group = mixer.heads // mixer.kv_heads
        shared = q_zcnh.device.type == "cpu"  # elsewhere the kernels that take a mask lack it
        if not shared:  # without a copy where there is one key head
            k_zksh, v_zksh = (
                z[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for z in (k_zksh, v_zksh)
            )
        args = (q_zcnh.transpose(1, 2), k_zksh, v_zksh, mask_z1cs)
        return function(*args, scale=mixer.scale, enable_gqa=shared).transpose(1, 2)
    # Heads that share a key head stand beside queries, so both products are plain matrix products.
    q_zkcrh = q_zcnh.unflatten(2, (mixer.kv_heads, -1)).transpose(1, 2)
    q_zkmh, sizes = q_zkcrh.flatten(2, 3), q_zkcrh.shape[2:4]
    if plain:
        wide = wide_dtype(q_zcnh.dtype)
        scores_zkms = (q_zkmh.to(wide) * mixer.scale) @ k_zksh.to(wide).transpose(-1, -2)
        if mixer.soft_cap:
            scores_zkms = torch.tanh(scores_zkms / mixer.soft_cap) * mixer.soft_cap
        if mask_z1cs is not None:
            hidden_z1c1s, least = ~mask_z1cs[..., None, :], torch.finfo(wide).min
            scores_zkcrs = scores_zkms.unflatten(2, sizes).masked_fill(hidden_z1c1s, least)
            scores_zkms = scores_zkcrs.flatten(2, 3)
        out_zkmh = (scores_zkms.softmax(-1) @ v_zksh.to(wide)).to(q_zcnh.dtype)
    else:  # one query
        out_zkmh = function(q_zkmh, k_zksh, v_zksh, mask_z1cs, scale=mixer.scale)
    return out_zkmh.unflatten(2, sizes).transpose(1, 2).flatten(2, 3)


def attend_also(
    q_b1nh: Float[Tensor, "b 1 n h"],
    k_bskh: Float[Tensor, "b s kv h"],
    k_b1kh: Float[Tensor, "b 1 kv h"],
    v_bskh: Float[Tensor, "b s kv h"],
    v_b1kh: Float[Tensor, "b 1 kv h"],
    mixer: Attention,
    sees_bs: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b 1 n h"]:
    """Attention of one query over S keys and one more; on a CPU it copies no keys, cast or not.

    Without a mask the query sees all S keys.
    """
    wide = wide_dtype(q_b1nh.dtype)
    if one_more_key.takes(q_b1nh, k_bskh) and not mixer.soft_cap:
        q_bkrh = q_b1nh[:, 0].unflatten(1, (mixer.kv_heads, -1))
        many, one = (
            [z.transpose(1, 2) for z in pair] for pair in ((k_bskh, v_bskh), (k_b1kh, v_b1kh))
        )
        out_bkrh = one_more_key.attend(q_bkrh, many, one, sees_bs, mixer.scale)
        return out_bkrh.flatten(1, 2)[:, None]
    if not k_bskh.dtype == q_b1nh.dtype == wide or not k_bskh.is_cpu:
        pairs = ((k_bskh, k_b1kh), (v_bskh, v_b1kh))
        keys, values = (torch.cat([many.to(one.dtype), one], 1) for many, one in pairs)
        if sees_bs is not None:
            sees_bs = nn.functional.pad(sees_bs, (0, 1), value=True)[:, None]
        return attend_masked(q_b1nh, keys, values, sees_bs, mixer)
    q_bkrh = (q_b1nh[:, 0] * mixer.scale).unflatten(1, (mixer.kv_heads, -1))
    scores = [q_bkrh @ keys.permute(0, 2, 3, 1) for keys in (k_bskh, k_b1kh)]
    scores_bkrs = torch.cat(scores, -1)
    if mixer.soft_cap:
        scores_bkrs = torch.tanh(scores_bkrs / mixer.soft_cap) * mixer.soft_cap
    if sees_bs is not None:
        seen_b11s = nn.functional.pad(sees_bs, (0, 1), value=True)[:, None, None]
        scores_bkrs = scores_bkrs.masked_fill(~seen_b11s, torch.finfo(wide).min)
    weights_bkrs = scores_bkrs.softmax(-1)
    out_bkrh = weights_bkrs[..., :-1] @ v_bskh.transpose(1, 2)
    out_bkrh = torch.addcmul(out_bkrh, weights_bkrs[..., -1:], v_b1kh.transpose(1, 2))
    return out_bkrh.flatten(1, 2)[:, None]


def _lags(before: int, queries: int, keys: int, device: torch.device) -> Int[Tensor, "c s"]:
    """How many places each key is before each query; `before` places precede the first query."""
    query = torch.arange(before, before + queries, dtype=torch.int32, device=device)
    return query[:, None] - torch.arange(keys, dtype=torch.int32, device=device)


def _recomputed(function, *args: Tensor) -> Tensor:
    """The function's result, of which only the arguments are kept for the gradient.

    Under torch.func transforms activations are not kept by autograd's hooks.
    """
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def _blocks(x: Tensor, before: int, number: int, length: int) -> Tensor:
    """[B, T, ...] to [B, number, length, ...], T padded with zeros (no document)."""
    no_document = 0 if x.is_floating_point() else -1
    padding = (0, 0) * (x.ndim - 2) + (before, number * length - before - x.shape[1])
    return nn.functional.pad(x, padding, value=no_document).unflatten(1, (number, length))


def _and_previous(blocks: Tensor) -> Tensor:
    """[B, R + G, C, ...] to [B, G, (R + 1) C, ...]: each block but the first R, behind R others."""
    last = blocks.shape[1] - BLOCKS_PER_WINDOW
    return torch.cat([blocks[:, i : i + last] for i in range(BLOCKS_PER_WINDOW + 1)], 2)
