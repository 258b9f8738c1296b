"""The attention block, and its state: a ring of keys and values."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from recurrentgemma.common.model.mixers import Attention, AttentionBlockCache, Rope
from recurrentgemma.common.model.state import round_capacity
from recurrentgemma.jax.cache import Hidden, Positions, empty_block, num_padding, prepend_history
from recurrentgemma.jax.layers import RMSNorm, SpecModule
from recurrentgemma.jax.runtime.sequence import by_parts, preceded
from recurrentgemma.jax.scan import as_positions, wide_dtype
from recurrentgemma.jax.softmax import attend, attend_also, attend_masked


def apply_rope(
    x: Float[Array, "b t n h"], positions: Positions, rope: Rope
) -> Float[Array, "b t n h"]:
    """Rotary embedding of the first `share` of each head; the rest passes through.

    The turned part is itself split in two, (x1 cos - x2 sin, x2 cos + x1 sin), in float32.
    """
    half = int(x.shape[-1] * rope.share) // 2
    rotated, passed = jnp.split(x, [2 * half], -1)
    wide = wide_dtype(x.dtype)
    exponent = jnp.arange(half, dtype=wide) / half
    angle = positions[..., None, None] * (jnp.asarray(rope.base, wide) ** -exponent / rope.stretch)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(rotated.astype(wide), 2, -1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), passed], -1)


class AttentionBlock(SpecModule):
    """Attention in which a token sees itself and `reach` tokens before it, or all."""

    width: int
    mixer: Attention
    final_w_init_variance_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them."""
        mixer, segment_pos = self.mixer, as_positions(segment_pos, x)
        q_btnh, k_btkh, v_btkh = (
            self.linear(f"proj_{name}", self.width, heads * mixer.head_dim, bias=False)(x).reshape(
                *x.shape[:2], heads, mixer.head_dim
            )
            for name, heads in (("q", mixer.heads), ("k", mixer.kv_heads), ("v", mixer.kv_heads))
        )
        if mixer.qk_norm:
            q_btnh = self.child(RMSNorm, "q_norm", mixer.head_dim)(q_btnh)
            k_btkh = self.child(RMSNorm, "k_norm", mixer.head_dim)(k_btkh)
        q_btnh, k_btkh = (apply_rope(z, segment_pos, mixer.rope) for z in (q_btnh, k_btkh))
        if not x.shape[1]:  # nothing happens to the state
            empty = empty_block(mixer, x.shape[0], v_btkh.dtype)
            encoded, new_cache = q_btnh, cache or empty
        elif cache is not None and x.shape[1] == 1:
            encoded, new_cache = _step(mixer, q_btnh, k_btkh, v_btkh, segment_pos, cache)
        else:
            kv_btkh = jnp.concatenate([k_btkh, v_btkh], -1)
            encoded, new_cache = _chunk(mixer, q_btnh, kv_btkh, segment_pos, cache, self.mesh)
        out = encoded.reshape(*x.shape[:2], mixer.heads * mixer.head_dim)
        sizes = (out.shape[-1], self.width, mixer.out_bias, self.final_w_init_variance_scale)
        return self.linear("proj_final", *sizes)(out), new_cache if return_cache else None


def _chunk(
    mixer: Attention,
    q_btnh: Float[Array, "b t n h"],
    kv_btkh: Float[Array, "b t kv hh"],
    segment_pos: Positions,
    cache: AttentionBlockCache | None,
    mesh: Mesh | None,
) -> tuple[Float[Array, "b t n h"], AttentionBlockCache]:
    if cache is None:
        attend_alone = functools.partial(_attend_alone, mixer)
        encoded = by_parts(attend_alone, mesh, q_btnh, kv_btkh, segment_pos)
        slots = mixer.reach or round_capacity(kv_btkh.shape[1])
        return encoded, _new_cache(cache, kv_btkh, segment_pos, slots)
    document = _documents(segment_pos)
    if mixer.reach is None:  # the slots are in order of time
        slots = cache.keys.shape[1]
        ring = jnp.concatenate([cache.keys, cache.values], -1)
        kv_bskh = jnp.concatenate([ring.astype(kv_btkh.dtype), kv_btkh], 1)
        filled = jnp.arange(slots) < cache.num_tokens[:, None]
        document_bs = jnp.concatenate([jnp.where(filled, 0, -1), document], 1)
    else:
        padding, slots = num_padding(segment_pos), cache.keys.shape[1]
        kv_bpz, document_bp = _history(cache, segment_pos, padding)
        kv_bsz = prepend_history(
            kv_bpz, kv_btkh.reshape(*kv_btkh.shape[:2], kv_bpz.shape[2]), padding
        )
        kv_bskh = kv_bsz.reshape(*kv_bsz.shape[:2], *kv_btkh.shape[2:])
        # Shifted by one, so that the zeros before the history mean no document.
        document_bs = prepend_history(
            document_bp[..., None] + 1, document[..., None] + 1, padding
        )[..., 0] - 1  # fmt: skip
    encoded = attend(q_btnh, kv_bskh, document, document_bs, mixer)
    return encoded, _new_cache(cache, kv_btkh, segment_pos, slots)


def _attend_alone(
    mixer: Attention, axis: str | None, q_btnh: Array, kv_btkh: Array, segment_pos: Array
) -> Array:
    """Attention of whole rows, or of a device's part to the tokens of the devices before it."""
    kv_bskh = preceded(kv_btkh, mixer.reach, axis)
    segment_pos = preceded(segment_pos + 1, mixer.reach, axis) - 1  # padding before the first
    document_bs = _documents(segment_pos)
    document_bt = document_bs[:, document_bs.shape[1] - q_btnh.shape[1] :]
    return attend(q_btnh, kv_bskh, document_bt, document_bs, mixer)


def _documents(segment_pos: Positions) -> Positions:
    """The number of each token's document, -1 at padding."""
    return jnp.where(segment_pos < 0, -1, (segment_pos == 0).cumsum(-1))


def _step(
    mixer: Attention,
    q_b1nh: Float[Array, "b 1 n h"],
    k_b1kh: Float[Array, "b 1 kv h"],
    v_b1kh: Float[Array, "b 1 kv h"],
    segment_pos: Int[Array, "b 1"],
    cache: AttentionBlockCache,
) -> tuple[Float[Array, "b 1 n h"], AttentionBlockCache]:
    """One token a row, against the ring as it lies: equal to a chunk of one token."""
    slots = cache.keys.shape[1]
    starts, is_token = segment_pos == 0, segment_pos >= 0
    num_before = jnp.where(starts, 0, cache.num_tokens[:, None])
    between = (segment_pos - jnp.arange(slots) - 1) % slots  # tokens since the one in the slot
    sees_bs = (between < num_before) | (between == slots - 1)
    pairs = ((cache.keys, k_b1kh), (cache.values, v_b1kh))
    (keys, k_old), (values, v_old) = (_replaced(*pair, segment_pos) for pair in pairs)
    if mixer.reach is None:  # the slot of the token held nothing
        encoded = attend_masked(q_b1nh, keys, values, sees_bs[:, None], mixer)
    else:  # the token still sees what it replaces
        sees_old = num_before >= slots
        encoded = attend_also(q_b1nh, keys, values, k_old, v_old, sees_bs, sees_old, mixer)
    num_tokens = (num_before + is_token)[:, 0]
    return encoded, AttentionBlockCache(keys, values, num_tokens)


def _replaced(
    ring_bskh: Float[Array, "b s kv h"],
    new_b1kh: Float[Array, "b 1 kv h"],
    segment_pos: Int[Array, "b 1"],
) -> tuple[Float[Array, "b s kv h"], Float[Array, "b 1 kv h"]]:
    """The ring after one token in each row, and what that token's slot held.

    Padding changes nothing; the first token of a document empties all other slots.
    """
    ring_bskh, slots = ring_bskh.astype(new_b1kh.dtype), ring_bskh.shape[1]
    starts, slot = (segment_pos == 0)[..., None, None], segment_pos % slots
    # XLA copies no ring: writes need what is read first, and a second place is out of range.
    rows, two = jnp.arange(slot.shape[0])[:, None], [slot, jnp.full_like(slot, slots)]
    places = rows, jnp.concatenate(two, 1)
    old_b1kh = ring_bskh.at[places].get(mode="fill", fill_value=0)[:, :1]
    old_b1kh = jnp.where(starts, 0, old_b1kh)
    ring_bskh = jnp.where(starts, old_b1kh, ring_bskh)
    new_b1kh = jnp.where((segment_pos < 0)[..., None, None], old_b1kh, new_b1kh)
    return ring_bskh.at[places].set(new_b1kh, mode="drop"), old_b1kh


def _history(
    cache: AttentionBlockCache, segment_pos: Positions, padding: Int[Array, " b"]
) -> tuple[Float[Array, "b s z"], Int[Array, "b s"]]:
    """The ring in order of time, and its documents: 0, which a continued document has, or none."""
    slots = cache.keys.shape[1]
    last = segment_pos.shape[1] - 1
    first_pos = jnp.take_along_axis(segment_pos, padding.clip(max=last)[:, None], 1)
    age = jnp.arange(slots, 0, -1)
    slot = (first_pos - age) % slots
    rows = jnp.arange(slot.shape[0])[:, None]
    kv = jnp.concatenate([cache.keys, cache.values], -1)
    kv = kv.reshape(*kv.shape[:2], kv.shape[2] * kv.shape[3])[rows, slot]
    return kv, jnp.where(age <= cache.num_tokens[:, None], 0, -1)


def _new_cache(
    cache: AttentionBlockCache | None,
    kv_btkh: Float[Array, "b t kv hh"],
    segment_pos: Positions,
    slots: int,
) -> AttentionBlockCache:
    """The ring after a chunk: per slot the newest token of the last document, else as it was."""
    length, last_pos = segment_pos.shape[1], segment_pos[:, -1]
    starts = (segment_pos == 0).any(-1)
    num_new = length - num_padding(segment_pos)
    num_new = jnp.where(starts, jnp.minimum(num_new - 1, last_pos) + 1, num_new)
    age = (last_pos[:, None] - jnp.arange(slots)) % slots
    rows = jnp.arange(age.shape[0])[:, None]
    newest = kv_btkh[rows, (length - 1 - age).clip(min=0)]
    if cache is None:
        kept, num_tokens = jnp.zeros_like(newest), num_new
    else:
        kept = jnp.concatenate([cache.keys, cache.values], -1).astype(newest.dtype)
        kept = jnp.where(starts[:, None, None, None], 0, kept)
        num_tokens = jnp.where(starts, num_new, cache.num_tokens + num_new)
    kv = jnp.where((age < num_new[:, None])[..., None, None], newest, kept)
    keys, values = jnp.split(kv, 2, -1)
    return AttentionBlockCache(keys, values, num_tokens.astype(jnp.int32))
