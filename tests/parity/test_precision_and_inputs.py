"""What stays wide in narrow models, and what a forward pass takes and refuses."""

import importlib
import math
from typing import Any

import numpy as np
import pytest
from cases import bfloat16, make_params
from comparing import make_model

from backends import BACKENDS, Backend
from recurrentgemma.common.model.activations import EMBEDDER
from recurrentgemma.common.model.config import Layer, ModelConfig
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.mixers import Attention, Rope

SUBMODULES = {"jax": "jax.numpy", "torch": "torch.nn"}
CONFIG = GriffinConfig(
    vocab_size=64,
    width=16,
    mlp_expanded_width=24,
    num_heads=2,
    block_types=("recurrent", "attention"),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=4,
    logits_soft_cap=0.0,
)
TOKENS, SEGMENT_POS = np.arange(24).reshape(2, 12), np.broadcast_to(np.arange(12), (2, 12))


@pytest.fixture(params=["jax", "torch"])
def twin(request) -> str:
    pytest.importorskip(SUBMODULES[request.param], reason=f"{request.param} is not installed")
    return request.param


def make(twin: str, dtype: str = "float32", compiled: bool = False):
    """A model as a function, which JAX may compile, and its empty state."""
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "jax":
        model, params = module.Griffin(CONFIG), module.init_params(CONFIG, 0, dtype)

        def forward(*args, **kwargs):
            return model.apply({"params": params}, *args, **kwargs)

        if compiled:
            import jax

            forward = jax.jit(forward)
        return forward, model.init_cache
    import torch

    model = module.Griffin(CONFIG, dtype=getattr(torch, dtype))
    model.reset_parameters(seed=0)
    return model.requires_grad_(False), model.init_cache


@pytest.mark.parametrize(("dtype", "rounded"), [("float32", False), ("bfloat16", True)])
def test_the_embedding_scale_is_rounded_to_the_dtype(
    backend: Backend, dtype: str, rounded: bool
) -> None:
    """sqrt(640) is 25.298, and 25.25 in bfloat16; a table of bfloat16 numbers shows either."""
    scale, table = math.sqrt(640), bfloat16(np.linspace(1, 2, 64))
    layer = Layer(Attention(1, 1, 2, 1, Rope(), 1.0), mlp=1, mlp_bias=False)
    config = ModelConfig(64, 1, (layer,), embedding_scale=scale)
    params = make_params(config) | {"embedder.input_embedding": table[:, None]}
    tokens = np.arange(64, dtype=np.int32)[None]
    model = make_model(backend, config, params, dtype)
    given = model.run(tokens, tokens, None, (EMBEDDER,)).activations[EMBEDDER].ravel()
    products = table * (bfloat16(np.array(scale)) if rounded else np.float32(scale))
    expected = bfloat16(products) if rounded else products.astype(np.float32)
    np.testing.assert_array_equal(given, expected)
    assert not np.array_equal(given, bfloat16(table * scale))


def test_logits_of_bfloat16_weights_are_not_rounded_to_it(twin: str) -> None:
    forward, _ = make(twin, "bfloat16", compiled=True)
    logits = np.asarray(forward(TOKENS, SEGMENT_POS)[0])
    assert logits.dtype == np.float32
    low_bits = logits.view(np.uint32) & 0xFFFF
    assert (low_bits != 0).mean() > 0.9


def test_angles_of_bfloat16_heads_are_not_rounded_to_it(twin: str) -> None:
    """Far into a document a rounded angle is a radian off; the result is rounded, once."""
    backend = BACKENDS[twin]
    module = importlib.import_module(f"recurrentgemma.{twin}.attention")
    x = bfloat16(np.random.default_rng(0).standard_normal((2, 12, 2, 16)))
    places = backend.array(SEGMENT_POS + 2000, "int32")
    narrow, wide = (
        backend.to_numpy(module.apply_rope(backend.array(x, dtype), places, Rope(share=0.5)))
        for dtype in ("bfloat16", "float32")
    )
    assert np.abs(narrow - wide).max() <= 2**-8 * np.abs(wide).max()


def test_float32_parameters_of_gates_and_norms_are_not_rounded() -> None:
    """In JAX a bfloat16 computation on float32 parameters: torch has no such setting."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import Griffin, init_params

    model = Griffin(CONFIG, dtype=jnp.bfloat16)
    params: Any = init_params(CONFIG, 0)
    apply = jax.jit(model.apply)

    def state(params):
        cache: Any = apply({"params": params}, TOKENS, SEGMENT_POS)[1]
        return np.asarray(cache["blocks.0"].rg_lru_state)

    rg_lru = params["blocks.0"]["recurrent_block"]["rg_lru"]
    before = state(params)
    rounded = rg_lru["a_param"].astype(jnp.bfloat16).astype(jnp.float32)
    rg_lru["a_param"] = rounded * (1 + 2.0**-11)
    nudged = state(params)
    rg_lru["a_param"] = rounded
    assert (nudged != state(params)).mean() > 0.9
    assert (before != state(params)).mean() > 0.9
    assert jax.tree.leaves(params)[0].dtype == jnp.float32


@pytest.mark.parametrize("cached", [False, True])
def test_padding_is_nothing_even_within_a_document(twin: str, cached: bool) -> None:
    forward, init_cache = make(twin, compiled=True)
    outcomes = []
    for padding in (3, 40):
        cache = init_cache(1) if cached else None
        tokens, segment_pos = np.array([[padding, padding, 7, 9]]), np.array([[-1, -1, 4, 5]])
        logits, cache = forward(tokens, segment_pos, cache)
        leaves = [np.asarray(leaf) for name in sorted(cache) for leaf in cache[name]]
        outcomes.append([np.asarray(logits)[:, 2:], *leaves])
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(one, other)


def test_numpy_arrays_of_any_kind(twin: str) -> None:
    forward, _ = make(twin)
    expected = np.asarray(forward(TOKENS, np.array(SEGMENT_POS))[0])
    actual = np.asarray(forward(TOKENS[::-1], SEGMENT_POS)[0])[::-1]  # strided back, read-only
    np.testing.assert_allclose(actual, expected, atol=1e-6)


INTEGERS = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_tokens_of_any_integer_type(twin: str, dtype: str) -> None:
    forward, _ = make(twin)
    expected = np.asarray(forward(TOKENS, np.array(SEGMENT_POS))[0])
    actual = np.asarray(forward(TOKENS.astype(dtype), np.array(SEGMENT_POS))[0])
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_tensors_of_any_integer_type(dtype: str) -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    forward, _ = make("torch")
    tokens, segment_pos = (
        torch.from_numpy(np.array(z)).to(getattr(torch, dtype)) for z in (TOKENS, SEGMENT_POS)
    )
    expected = forward(TOKENS, SEGMENT_POS)[0]
    assert torch.equal(forward(tokens, segment_pos)[0], expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bool", "complex64"])
def test_what_is_no_integer_is_refused(twin: str, dtype: str) -> None:
    forward, _ = make(twin)
    for inputs in ((TOKENS.astype(dtype), SEGMENT_POS), (TOKENS, SEGMENT_POS.astype(dtype))):
        with pytest.raises(ValueError, match="tokens and segment_pos must be integers, got "):
            forward(*inputs)


@pytest.mark.usefixtures("unchecked_types")
def test_tensors_that_are_no_integers_are_refused() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    forward, _ = make("torch")
    tokens = torch.from_numpy(TOKENS)
    for dtype in (torch.bfloat16, torch.bool, torch.complex64):
        match = f"must be integers, got {dtype} and torch.int64"
        with pytest.raises(ValueError, match=match):
            forward(tokens.to(dtype), tokens)


def test_states_that_do_not_fit(twin: str) -> None:
    forward, init_cache = make(twin)
    with pytest.raises(ValueError, match="batch size 2 expected, got 3"):
        forward(TOKENS, SEGMENT_POS, init_cache(3))
    partial = {"blocks.0": init_cache(2)["blocks.0"]}
    with pytest.raises(ValueError, match=r"missing blocks\.1\.keys\n  missing blocks\.1\.values"):
        forward(TOKENS, SEGMENT_POS, partial)
    with pytest.raises(ValueError, match=r"tokens and segment_pos must have one shape \[B, T\]"):
        forward(TOKENS, SEGMENT_POS[:1])


def test_configs_of_numpy_integers_and_of_nothing() -> None:
    fields = CONFIG.to_dict()
    assert GriffinConfig.from_dict(fields | {"width": np.int64(16)}) == CONFIG
    with pytest.raises(ValueError, match="block_types must be a sequence, got None"):
        GriffinConfig.from_dict(fields | {"block_types": None})
    with pytest.raises(ValueError, match=r"width must be a positive integer, got 16\.0"):
        GriffinConfig.from_dict(fields | {"width": 16.0})
