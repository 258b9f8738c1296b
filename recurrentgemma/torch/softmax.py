"""Softmax attention: under a mask, and over all earlier keys in blocks of queries."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurrentgemma.common.model.mixers import Attention
from recurrentgemma.torch.scan import forward_levels, wide_dtype

BLOCK = 256  # queries that share an array of scores


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
