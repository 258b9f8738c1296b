"""The attention block, and its state: a ring of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recurrentgemma.common.model.mixers import Attention, AttentionBlockCache, Rope
from recurrentgemma.common.model.state import round_capacity
from recurrentgemma.torch.cache import Hidden, Positions, empty_block, num_padding, prepend_history
from recurrentgemma.torch.layers import Linear, RMSNorm, SpecModule
from recurrentgemma.torch.runtime.known import is_known, once_a_step, places
from recurrentgemma.torch.runtime.neighbours import Before
from recurrentgemma.torch.runtime.steps import ages, is_given_up, known_rows, step_at, used_slots
from recurrentgemma.torch.runtime.teams import ALONE, SplitOf, Team, key_heads, mixer_part
from recurrentgemma.torch.scan import as_positions, wide_dtype
from recurrentgemma.torch.softmax import attend, attend_masked


def apply_rope(
    x: Float[Tensor, "b t n h"], positions: Positions, rope: Rope
) -> Float[Tensor, "b t n h"]:
    """Rotary embedding of the first `share` of each head; the rest passes through.

    The turned part is itself split in two, (x1 cos - x2 sin, x2 cos + x1 sin), in float32.
    """
    half = int(x.shape[-1] * rope.share) // 2
    rotated, passed = x.split([2 * half, x.shape[-1] - 2 * half], -1)
    wide = wide_dtype(x.dtype)
    sin, cos = once_a_step(_turns, positions, rope, half, wide)
    x1, x2 = rotated.to(wide).chunk(2, -1)
    # Not addcmul with value=-1: `torch.func.linearize` of it crashes in PyTorch 2.13.
    turned = x1 * cos - x2 * sin, torch.addcmul(x2 * cos, x1, sin)
    return torch.cat([*(z.to(x.dtype) for z in turned), passed], -1)


def _turns(
    positions: Positions, rope: Rope, half: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "b t 1 r"], Float[Tensor, "b t 1 r"]]:
    """Sines and cosines of the angles by which positions turn."""
    exponent = torch.arange(half, device=positions.device, dtype=dtype) / half
    angle = positions[..., None, None] * (rope.base**-exponent / rope.stretch)
    return torch.sin(angle), torch.cos(angle)


class AttentionBlock(SpecModule):
    """Attention in which a token sees itself and `reach` tokens before it, or all."""

    def __init__(
        self, width: int, mixer: Attention, final_w_init_variance_scale=1.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.mixer = mixer
        query, key = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        variance = final_w_init_variance_scale
        self.proj_q = Linear(width, query, bias=False, dtype=dtype)
        self.proj_k = Linear(width, key, bias=False, dtype=dtype)
        self.proj_v = Linear(width, key, bias=False, dtype=dtype)
        if mixer.qk_norm:
            self.q_norm = RMSNorm(mixer.head_dim, device="meta", dtype=dtype)
            self.k_norm = RMSNorm(mixer.head_dim, device="meta", dtype=dtype)
        self.proj_final = Linear(query, width, mixer.out_bias, variance, dtype)
        self.used_heads: list[int] | None = None  # of the key heads, where all processes have all
        self.materialise(device)

    def _join(self, team: Team, split: SplitOf) -> None:
        """As `SpecModule`; key heads that cannot be divided are computed by all."""
        del split
        mixer, self.team, self.mixer = self.mixer, team, mixer_part(self.mixer, team)
        if mixer.kv_heads % team.count:
            self.used_heads = key_heads(mixer, team.index, team.count)
        if mixer.qk_norm:  # each process has some of the heads that the scale is for
            self.q_norm.team = team
            self.k_norm.team = ALONE if self.used_heads else team

    def forward(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them."""
        mixer, segment_pos = self.mixer, as_positions(segment_pos, x)
        shared = self.team.shared(x)
        key_input = shared if self.used_heads is None else x
        projections = (self.proj_q, shared), (self.proj_k, key_input), (self.proj_v, key_input)
        q_btnh, k_btkh, v_btkh = (f(x).unflatten(-1, (-1, mixer.head_dim)) for f, x in projections)
        if mixer.qk_norm:
            q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh)
        if self.used_heads is not None:
            kv_btkh = self.team.shared(torch.cat([k_btkh, v_btkh], -1))
            k_btkh, v_btkh = kv_btkh[:, :, self.used_heads].chunk(2, -1)
        # Rotated together: in decoding it is the number of operations that costs.
        qk_btmh = apply_rope(torch.cat([q_btnh, k_btkh], 2), segment_pos, mixer.rope)
        q_btnh, k_btkh = qk_btmh.split([mixer.heads, mixer.kv_heads], 2)
        if not x.shape[1]:  # nothing happens to the state
            empty = empty_block(mixer, x.shape[0], v_btkh.dtype, x.device)
            encoded, new_cache = q_btnh, cache or empty
        elif isinstance(cache, Before):
            kv_bskh, document_bs = cache.keys(torch.cat([k_btkh, v_btkh], -1), mixer.reach)
            document_bt = document_bs[:, -x.shape[1] :]
            encoded, new_cache = attend(q_btnh, kv_bskh, document_bt, document_bs, mixer), None
        elif cache is not None and x.shape[1] == 1:
            rows = known_rows(mixer, segment_pos, cache)
            if rows is None:
                encoded, new_cache = _step(mixer, q_btnh, k_btkh, v_btkh, segment_pos, cache)
            else:
                encoded, new_cache = step_at(mixer, q_btnh, k_btkh, v_btkh, rows, cache)
        else:
            kv_btkh = torch.cat([k_btkh, v_btkh], -1)
            encoded, new_cache = _chunk(mixer, q_btnh, kv_btkh, segment_pos, cache)
        return self.proj_final(encoded.flatten(2)), new_cache if return_cache else None


def _chunk(
    mixer: Attention,
    q_btnh: Float[Tensor, "b t n h"],
    kv_btkh: Float[Tensor, "b t kv hh"],
    segment_pos: Positions,
    cache: AttentionBlockCache | None,
) -> tuple[Float[Tensor, "b t n h"], AttentionBlockCache]:
    document = torch.where(segment_pos < 0, -1, (segment_pos == 0).cumsum(-1))
    slots = mixer.reach or round_capacity(kv_btkh.shape[1])
    slots = slots if cache is None else cache.keys.shape[1]
    if cache is None or (is_known(cache.num_tokens) and not cache.num_tokens.any()):
        kv_bskh, document_bs = kv_btkh, document
    elif mixer.reach is None:  # the slots are in order of time
        used = int(cache.num_tokens.max()) if is_known(cache.num_tokens) else slots
        ring = torch.cat([cache.keys[:, :used], cache.values[:, :used]], -1)
        kv_bskh = torch.cat([ring.to(kv_btkh.dtype), kv_btkh], 1)
        filled = torch.arange(used, device=document.device) < cache.num_tokens[:, None]
        document_bs = torch.cat([torch.where(filled, 0, -1), document], 1)
    else:
        padding = num_padding(segment_pos)
        kv_bpz, document_bp = _history(cache, segment_pos, padding)
        kv_bsz = prepend_history(kv_bpz, kv_btkh.flatten(2), padding)
        kv_bskh = kv_bsz.unflatten(-1, kv_btkh.shape[2:])
        # Shifted by one, so that the zeros before the history mean no document.
        document_bs = prepend_history(
            document_bp[..., None] + 1, document[..., None] + 1, padding
        )[..., 0] - 1  # fmt: skip
    encoded = attend(q_btnh, kv_bskh, document, document_bs, mixer)
    return encoded, _new_cache(cache, kv_btkh, segment_pos, slots)


def _step(
    mixer: Attention,
    q_b1nh: Float[Tensor, "b 1 n h"],
    k_b1kh: Float[Tensor, "b 1 kv h"],
    v_b1kh: Float[Tensor, "b 1 kv h"],
    segment_pos: Int[Tensor, "b 1"],
    cache: AttentionBlockCache,
) -> tuple[Float[Tensor, "b 1 n h"], AttentionBlockCache]:
    """One token a row, against the ring as it lies: equal to a chunk of one token."""
    slots = cache.keys.shape[1]
    starts, is_token = segment_pos == 0, segment_pos >= 0
    num_before = cache.num_tokens[:, None].masked_fill(starts, 0)
    used = used_slots(mixer, segment_pos, slots)
    age = ages(segment_pos, used, slots)
    sees_bs = age < num_before
    pairs = ((cache.keys, k_b1kh), (cache.values, v_b1kh))
    if mixer.reach is None:  # the slot of the token held nothing
        rings = [_replaced(ring, new, segment_pos) for ring, new in pairs]
        keys, values = (ring[:, :used] for ring in rings)
        sees_bs = sees_bs | (age == slots - 1)
    else:
        keys, values = (torch.cat([ring.to(z.dtype), z], 1) for ring, z in pairs)
        rings = [_replaced(ring, new, segment_pos) for ring, new in pairs]
        sees_bs = nn.functional.pad(sees_bs, (0, 1), value=True)
    encoded = attend_masked(q_b1nh, keys, values, sees_bs[:, None], mixer)
    num_tokens = (num_before + is_token)[:, 0]
    return encoded, AttentionBlockCache(rings[0], rings[1], num_tokens)


def _replaced(
    ring_bskh: Float[Tensor, "b s kv h"],
    new_b1kh: Float[Tensor, "b 1 kv h"],
    segment_pos: Int[Tensor, "b 1"],
) -> Float[Tensor, "b s kv h"]:
    """The ring after one token in each row, in place inside `giving_up`.

    Padding changes nothing; the first token of a document empties all other slots.
    """
    ring_bskh = ring_bskh.to(new_b1kh.dtype)
    rows = torch.arange(segment_pos.shape[0], device=segment_pos.device)[:, None]
    index = rows, segment_pos % ring_bskh.shape[1]
    found = places(segment_pos) or (-1, 0)
    if min(found) < 0:
        padding = (segment_pos < 0)[..., None, None]
        new_b1kh = torch.where(padding, ring_bskh[index], new_b1kh)
    if 0 in found:
        ring_bskh = ring_bskh.masked_fill((segment_pos == 0)[..., None, None], 0)
    if is_given_up():
        return ring_bskh.index_put_(index, new_b1kh)
    return ring_bskh.index_put(index, new_b1kh)


def _history(
    cache: AttentionBlockCache, segment_pos: Positions, padding: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b s z"], Int[Tensor, "b s"]]:
    """The ring in order of time, and its documents: 0, which a continued document has, or none."""
    slots = cache.keys.shape[1]
    last = segment_pos.shape[1] - 1
    first_pos = segment_pos.gather(1, padding.clamp(max=last)[:, None])
    age = torch.arange(slots, 0, -1, device=segment_pos.device)
    slot = (first_pos - age) % slots
    rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
    kv = torch.cat([cache.keys, cache.values], -1).flatten(2)[rows, slot]
    return kv, torch.where(age <= cache.num_tokens[:, None], 0, -1)


def _new_cache(
    cache: AttentionBlockCache | None,
    kv_btkh: Float[Tensor, "b t kv hh"],
    segment_pos: Positions,
    slots: int,
) -> AttentionBlockCache:
    """The ring after a chunk: per slot the newest token of the last document, else as it was."""
    length, last_pos = segment_pos.shape[1], segment_pos[:, -1]
    starts = (segment_pos == 0).any(-1)
    num_new = length - num_padding(segment_pos)
    num_new = torch.where(starts, torch.minimum(num_new - 1, last_pos) + 1, num_new)
    age = (last_pos[:, None] - torch.arange(slots, device=segment_pos.device)) % slots
    rows = torch.arange(age.shape[0], device=age.device)[:, None]
    newest = kv_btkh[rows, (length - 1 - age).clamp(min=0)]
    if cache is None:
        kept, num_tokens = torch.zeros_like(newest), num_new
    else:
        kept = torch.cat([cache.keys, cache.values], -1).to(newest.dtype)
        kept = torch.where(starts[:, None, None, None], 0, kept)
        num_tokens = torch.where(starts, num_new, cache.num_tokens + num_new)
    kv = torch.where((age < num_new[:, None])[..., None, None], newest, kept)
    # Contiguous, as a step leaves them: else a compiled step would be compiled once more.
    keys, values = (z.contiguous() for z in kv.chunk(2, -1))
    return AttentionBlockCache(keys, values, num_tokens.to(torch.int32))
