"""A step of attention writes its token into the state where it lies."""

import re

import pytest

pytest.importorskip("jax", reason="jax is not installed")
import jax
import jax.numpy as jnp

from recurrentgemma.common.model.mixers import Attention, AttentionBlockCache, Rope
from recurrentgemma.jax.attention import _step

SLOTS = 48


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="this is what XLA does on a CPU")
@pytest.mark.parametrize("reach", [SLOTS, None])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_ring_is_copied(rows: int, reach: int | None) -> None:
    mixer = Attention(4, 1, 16, reach, Rope(), 0.25)
    q, k, v = (jax.ShapeDtypeStruct((rows, 1, n, 16), jnp.float32) for n in (4, 1, 1))
    ring = jax.ShapeDtypeStruct((rows, SLOTS, 1, 16), jnp.float32)
    cache = AttentionBlockCache(ring, ring, jax.ShapeDtypeStruct((rows,), jnp.int32))
    segment_pos = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def step(q, k, v, segment_pos, cache):
        return _step(mixer, q, k, v, segment_pos, cache)

    text = jax.jit(step, donate_argnums=4).lower(q, k, v, segment_pos, cache).compile().as_text()
    assert text is not None
    made = re.findall(rf"= f32\[{rows},(\d+),1,16\]\S* (\w+)\(", text)
    rings = {kind for places, kind in made if int(places) >= SLOTS}
    assert "parameter" in rings
    assert not rings & {"copy", "concatenate"}
