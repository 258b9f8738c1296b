"""What Griffin's attention lacks: grouped heads, soft caps, QK-norm, a reach without limit."""

import numpy as np
import pytest
from cases import bfloat16, make_batch, make_params, make_tokens
from comparing import check_gradients

from backends import Backend
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.config import Layer, ModelConfig
from recurrentgemma.common.model.mixers import Attention, Recurrent, Rope
from tolerances import assert_close

CAPPED = Attention(
    4, 2, 8, reach=6, rope=Rope(10_000.0, 1.0, 1.0), scale=0.4, soft_cap=2.0, qk_norm=False,
    out_bias=True,
)  # fmt: skip
NORMED = Attention(
    4, 2, 8, reach=None, rope=Rope(1_000.0, 0.75, 4.0), scale=0.3, soft_cap=0.0, qk_norm=True,
    out_bias=False,
)  # fmt: skip
CONFIG = ModelConfig(
    vocab_size=31,
    width=24,
    layers=(
        Layer(CAPPED, mlp=32, mlp_bias=False, post_norms=True),
        Layer(NORMED, mlp=32, mlp_bias=True, post_norms=True),
        Layer(Recurrent(32, 2, 3), mlp=32, mlp_bias=True, post_norms=False),
    ),
    embedding_scale=4.5,
    soft_cap=3.0,
)
CAPACITY = 64


def test_one_pass(backend: Backend) -> None:
    tokens, segment_pos = make_batch(CONFIG, 29)
    expected, _ = reference.forward(CONFIG, make_params(CONFIG), tokens, segment_pos)
    logits, _ = backend.griffin(CONFIG, make_params(CONFIG))(tokens, segment_pos)
    real = segment_pos >= 0
    assert_close(logits[real], expected[real], "logits", "float64")


def test_chunks_and_steps(backend: Backend) -> None:
    """One document a row, past the limited reach; the growing state has a capacity."""
    model, params = backend.griffin(CONFIG, make_params(CONFIG)), make_params(CONFIG)
    state, place = reference.init_state(CONFIG, 3, CAPACITY), 0
    for length in (11, 1, 5, 1):
        tokens = make_tokens(CONFIG, 3, length, seed=place)
        segment_pos = np.tile(np.arange(place, place + length, dtype=np.int32), (3, 1))
        expected, after = reference.forward(CONFIG, params, tokens, segment_pos, state)
        logits, new_state = model(tokens, segment_pos, state)
        assert_close(logits, expected, "logits", "float64")
        assert_close(new_state, after, "state", "float64")
        state, place = after, place + length


def test_gradients_of_the_twins(twins: tuple[Backend, Backend]) -> None:
    check_gradients(twins, CONFIG, 13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrower_dtypes(backend: Backend, dtype: str) -> None:
    tokens, segment_pos = make_batch(CONFIG, 29)
    params = {
        path: value.astype(np.float32) if dtype == "float32" else bfloat16(value)
        for path, value in make_params(CONFIG).items()
    }
    expected, _ = reference.forward(CONFIG, params, tokens, segment_pos)
    logits, _ = backend.griffin(CONFIG, params, dtype)(tokens, segment_pos)
    real = segment_pos >= 0
    assert_close(logits[real], expected[real], "logits", dtype)
