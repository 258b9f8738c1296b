"""Positions say the same in any integer dtype, however narrow."""

from typing import Any

import numpy as np
import pytest
from cases import make_config, make_params, make_tokens
from sweeps import fewer_in_jax

from backends import Backend
from backends.base import Network
from tolerances import assert_close

CONFIG = make_config("RA", attention_window_size=10)
DTYPES = ("int8", "uint8", "int16", "uint16")
BLOCKS = {
    "Conv1D": ("blocks.0.recurrent_block.conv_1d", CONFIG.lru_width),
    "RGLRU": ("blocks.0.recurrent_block.rg_lru", CONFIG.lru_width),
    "LocalAttentionBlock": ("blocks.1.attention_block", CONFIG.width),
}
# The annotations mean signed integers.
pytestmark = pytest.mark.usefixtures("unchecked_types")
LENGTH = 128  # the last position is the largest of int8


def check(network: Network, inputs: np.ndarray, dtype: str) -> None:
    expected, actual = (outcomes(network, inputs, d) for d in ("int32", dtype))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, "state", "float64")


def outcomes(network: Network, inputs: np.ndarray, dtype: str) -> list[Any]:
    """Outputs and states: of everything at once, then of a prompt and what follows it.

    Two rows: one goes on, and one has a document that starts after the prompt. They go over the
    ring's edge step by step, but for a last chunk.
    """
    whole = np.tile(np.arange(LENGTH), (2, 1)).astype(dtype)
    results, cut = [*network(inputs, whole)], LENGTH - 17
    y, state = network(inputs[:, :cut], whole[:, :cut])
    results += [y, state]
    following = np.stack([np.arange(cut, LENGTH), np.arange(LENGTH - cut)]).astype(dtype)
    places = [(t, t + 1) for t in range(12)] + [(12, LENGTH - cut)]
    for start, end in places:
        y, state = network(inputs[:, cut + start : cut + end], following[:, start:end], state)
        results += [y, state]
    return results


@pytest.mark.parametrize(
    ("backend", "dtype"), fewer_in_jax(DTYPES, ["int8", "uint16"]), indirect=["backend"]
)
def test_of_a_model(backend: Backend, dtype: str) -> None:
    model = backend.griffin(CONFIG, make_params(CONFIG))
    check(model, make_tokens(CONFIG, 2, LENGTH), dtype)


EACH = [(kind, dtype) for kind in BLOCKS for dtype in DTYPES]
ATTENTION = "LocalAttentionBlock"
SOME = [("Conv1D", "uint8"), ("RGLRU", "int16"), (ATTENTION, "int8"), (ATTENTION, "uint16")]


@pytest.mark.parametrize(("backend", "case"), fewer_in_jax(EACH, SOME), indirect=["backend"])
def test_of_a_block_alone(backend: Backend, case: tuple[str, str]) -> None:
    kind, dtype = case
    prefix, width = BLOCKS[kind]
    x = np.random.default_rng(0).standard_normal((2, LENGTH, width))
    check(backend.block(kind, CONFIG, prefix, make_params(CONFIG)), x, dtype)


@pytest.mark.parametrize("kind", BLOCKS)
def test_of_no_integers_are_refused(backend: Backend, kind: str) -> None:
    prefix, width = BLOCKS[kind]
    block = backend.block(kind, CONFIG, prefix, make_params(CONFIG), "float32")
    for length in (2, 1):
        x, whole = np.zeros((1, length, width)), np.zeros((1, length))
        for dtype in ("bool", "float32", "complex64"):
            with pytest.raises(ValueError, match="segment_pos must be of an integer dtype, got "):
                block(x, whole.astype(dtype))
        with pytest.raises(ValueError, match=r"segment_pos must have shape \(1, .\), got \(2, .\)"):
            block(x, np.tile(whole, (2, 1)).astype("int32"))
