"""Local multi-query attention in blocks: memory grows with T, never with T squared."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.torch.cache import (
    AttentionBlockCache,
    init_block_cache,
    num_padding,
    prepend_history,
)
from recurrentgemma.torch.layers import SpecModule
from recurrentgemma.torch.scan import as_positions, wide_dtype

MAX_WAVELENGTH = 10_000
BLOCKS_PER_WINDOW = 4


def apply_rope(
    x: Float[Tensor, "b t n h"], positions: Int[Tensor, "b t"]
) -> Float[Tensor, "b t n h"]:
    """Rotary embedding of the first half of each head; the second half passes through.

    The rotated half is itself split in two, (x1 cos - x2 sin, x2 cos + x1 sin), in float32.
    """
    rotated, passed = x.chunk(2, -1)
    half = rotated.shape[-1] // 2
    wide = wide_dtype(x.dtype)
    exponent = torch.arange(half, device=x.device, dtype=wide) / half
    angle = positions[..., None, None] * MAX_WAVELENGTH**-exponent
    sin, cos = torch.sin(angle), torch.cos(angle)
    x1, x2 = rotated.to(wide).chunk(2, -1)
    turned = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
    return torch.cat([*(z.to(x.dtype) for z in turned), passed], -1)


def local_attention(
    q_btnh: Float[Tensor, "b t n h"],
    kv_bsh: Float[Tensor, "b s hh"],
    document_bt: Int[Tensor, "b t"],
    document_bs: Int[Tensor, "b s"],
    window: int,
) -> Float[Tensor, "b t n h"]:
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
    lag_cs = (
        history
        + torch.arange(q_bgcnh.shape[2], device=q_btnh.device)[:, None]
        - torch.arange(kv_bgsh.shape[2], device=q_btnh.device)
    )
    mask_bgcs = (lag_cs >= 0) & (lag_cs <= window)
    mask_bgcs = mask_bgcs & (document_bgc[..., None] == document_bgs[..., None, :])
    k_bgsh, v_bgsh = kv_bgsh.chunk(2, -1)
    return _attend(q_bgcnh, k_bgsh, v_bgsh, mask_bgcs).flatten(1, 2)[:, :length]


def _attend(
    q_bgcnh: Float[Tensor, "b g c n h"],
    k_bgsh: Float[Tensor, "b g s h"],
    v_bgsh: Float[Tensor, "b g s h"],
    mask_bgcs: Bool[Tensor, "b g c s"],
) -> Float[Tensor, "b g c n h"]:
    """Multi-query attention in each of G blocks, its softmax in float32."""
    q_zcnh, k_zsh, v_zsh, mask_zcs = (z.flatten(0, 1) for z in (q_bgcnh, k_bgsh, v_bgsh, mask_bgcs))
    k_z1sh, v_z1sh, mask_z1cs = k_zsh[:, None], v_zsh[:, None], mask_zcs[:, None]
    if q_zcnh.shape[1] == 1:  # heads take the place of queries, since they share their keys
        out_zcnh = nn.functional.scaled_dot_product_attention(q_zcnh, k_z1sh, v_z1sh, mask_z1cs)
    else:
        num_heads = q_zcnh.shape[2]
        out_zcnh = nn.functional.scaled_dot_product_attention(
            q_zcnh.transpose(1, 2),
            k_z1sh.expand(-1, num_heads, -1, -1),
            v_z1sh.expand(-1, num_heads, -1, -1),
            mask_z1cs,
        ).transpose(1, 2)
    return out_zcnh.unflatten(0, q_bgcnh.shape[:2])


def _blocks(x: Tensor, before: int, number: int, length: int) -> Tensor:
    """[B, T, ...] to [B, number, length, ...], T padded with zeros (no document)."""
    no_document = 0 if x.is_floating_point() else -1
    padding = (0, 0) * (x.ndim - 2) + (before, number * length - before - x.shape[1])
    return nn.functional.pad(x, padding, value=no_document).unflatten(1, (number, length))


def _and_previous(blocks: Tensor) -> Tensor:
    """[B, R + G, C, ...] to [B, G, (R + 1) C, ...]: each block but the first R, behind R others."""
    last = blocks.shape[1] - BLOCKS_PER_WINDOW
    return torch.cat([blocks[:, i : i + last] for i in range(BLOCKS_PER_WINDOW + 1)], 2)


class LocalAttentionBlock(SpecModule):
    """Multi-query attention in which a token sees itself and the W tokens before it."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.proj_q = self.linear("proj_q", device, dtype)
        self.proj_k = self.linear("proj_k", device, dtype)
        self.proj_v = self.linear("proj_v", device, dtype)
        self.proj_final = self.linear("proj_final", device, dtype)
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        segment_pos: Int[Tensor, "b t"],
        cache: AttentionBlockCache | None = None,
    ) -> tuple[Float[Tensor, "b t d"], AttentionBlockCache]:
        """Returns the outputs and the state after them."""
        segment_pos = as_positions(segment_pos, x)
        num_heads = self.config.num_heads
        # Rotated together: in decoding it is the number of operations that costs.
        qk_btmh = torch.cat([self.proj_q(x), self.proj_k(x)], -1).unflatten(-1, (num_heads + 1, -1))
        q_btnh, k_bt1h = apply_rope(qk_btmh, segment_pos).split([num_heads, 1], 2)
        k_bth, v_bth = k_bt1h[:, :, 0], self.proj_v(x)
        if not x.shape[1]:  # nothing happens to the state
            kind = TemporalBlockType.ATTENTION
            empty: Any = init_block_cache(self.config, kind, x.shape[0], v_bth.dtype, x.device)
            encoded, new_cache = q_btnh, cache or empty
        elif cache is not None and x.shape[1] == 1:
            encoded, new_cache = _step(q_btnh, k_bth, v_bth, segment_pos, cache)
        else:
            kv_bth = torch.cat([k_bth, v_bth], -1)
            encoded, new_cache = self._chunk(q_btnh, kv_bth, segment_pos, cache)
        return self.proj_final(encoded.flatten(2)), new_cache

    def _chunk(
        self,
        q_btnh: Float[Tensor, "b t n h"],
        kv_bth: Float[Tensor, "b t hh"],
        segment_pos: Int[Tensor, "b t"],
        cache: AttentionBlockCache | None,
    ) -> tuple[Float[Tensor, "b t n h"], AttentionBlockCache]:
        document = torch.where(segment_pos < 0, -1, (segment_pos == 0).cumsum(-1))
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
    q_b1nh: Float[Tensor, "b 1 n h"],
    k_b1h: Float[Tensor, "b 1 h"],
    v_b1h: Float[Tensor, "b 1 h"],
    segment_pos: Int[Tensor, "b 1"],
    cache: AttentionBlockCache,
) -> tuple[Float[Tensor, "b 1 n h"], AttentionBlockCache]:
    """One token a row, against the ring as it lies: what a chunk of one token would give."""
    window = cache.keys.shape[1]
    starts, is_token = segment_pos == 0, segment_pos >= 0
    num_before = cache.num_tokens[:, None].masked_fill(starts, 0)
    slot = torch.arange(window, device=segment_pos.device)
    between = (segment_pos - slot - 1) % window  # tokens since the one in the slot
    sees_bs = nn.functional.pad(between < num_before, (0, 1), value=True)
    replaced = ((between == window - 1) & is_token)[..., None, None]
    starts = starts[..., None, None]

    (keys, ring_of_keys), (values, ring_of_values) = (
        _extended_and_replaced(ring.to(new.dtype), new[:, None], starts, replaced)
        for ring, new in ((cache.keys, k_b1h), (cache.values, v_b1h))
    )
    encoded = _attend(q_b1nh[:, None], keys, values, sees_bs[:, None, None])[:, 0]
    num_tokens = (num_before + is_token)[:, 0]
    return encoded, AttentionBlockCache(ring_of_keys, ring_of_values, num_tokens)


def _extended_and_replaced(
    ring_bw1h: Tensor, new_b11h: Tensor, starts: Tensor, replaced: Tensor
) -> tuple[Tensor, Tensor]:
    """What one token sees, [B, 1, W + 1, H], and the ring after it."""
    seen = torch.cat([ring_bw1h, new_b11h], 1).transpose(1, 2)
    return seen, torch.where(replaced, new_b11h, ring_bw1h.masked_fill(starts, 0))


def _history(
    cache: AttentionBlockCache, segment_pos: Int[Tensor, "b t"], padding: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b w hh"], Int[Tensor, "b w"]]:
    """The ring in order of time, and its documents: 0, which a continued document has, or none."""
    window = cache.keys.shape[1]
    last = segment_pos.shape[1] - 1
    first_pos = segment_pos.gather(1, padding.clamp(max=last)[:, None])
    age = torch.arange(window, 0, -1, device=segment_pos.device)
    slot = (first_pos - age) % window
    rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
    kv = torch.cat([cache.keys[:, :, 0], cache.values[:, :, 0]], -1)[rows, slot]
    return kv, torch.where(age <= cache.num_tokens[:, None], 0, -1)


def _new_cache(
    cache: AttentionBlockCache | None,
    kv_bth: Float[Tensor, "b t hh"],
    segment_pos: Int[Tensor, "b t"],
    window: int,
) -> AttentionBlockCache:
    """The ring after a chunk: per slot the newest token of the last document, else as it was."""
    length, last_pos = segment_pos.shape[1], segment_pos[:, -1]
    starts = (segment_pos == 0).any(-1)
    num_new = length - num_padding(segment_pos)
    num_new = torch.where(starts, torch.minimum(num_new - 1, last_pos) + 1, num_new)
    age = (last_pos[:, None] - torch.arange(window, device=segment_pos.device)) % window
    rows = torch.arange(age.shape[0], device=age.device)[:, None]
    newest = kv_bth[rows, (length - 1 - age).clamp(min=0)]
    if cache is None:
        kept, num_tokens = torch.zeros_like(newest), num_new
    else:
        kept = torch.cat([cache.keys[:, :, 0], cache.values[:, :, 0]], -1).to(newest.dtype)
        kept = torch.where(starts[:, None, None], 0, kept)
        num_tokens = torch.where(starts, num_new, cache.num_tokens + num_new)
    kv = torch.where((age < num_new[:, None])[..., None], newest, kept)
    # Contiguous, as a step leaves them: else a compiled step would be compiled once more.
    keys, values = (z.contiguous() for z in kv[:, :, None].chunk(2, -1))
    return AttentionBlockCache(keys, values, num_tokens.to(torch.int32))
