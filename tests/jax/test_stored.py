"""The forms in which an engine keeps matrices on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_tokens
from samplers import make_sampler

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.params import einsum
from recurrentgemma.common.quantization import SCHEMES, Quantized, dequantize, quantize
from recurrentgemma.jax.checkpoint import load_checkpoint
from recurrentgemma.jax.engine import ModelEngine
from recurrentgemma.jax.products import Rows, Turned, by_rows, dense, product
from recurrentgemma.jax.quantization import quantize_matrices
from recurrentgemma.jax.runtime.stored import as_q8, as_stored
from recurrentgemma.jax.runtime.trees import get_path
from tolerances import assert_close

STEPS = 3


@pytest.fixture(scope="module")
def sampler():
    """A model in bfloat16."""
    return make_sampler("jax", dtype="bfloat16")


def decoded(engine: ModelEngine, rows: int) -> np.ndarray:
    """Logits after each of a few tokens, the same in all rows, [T, B, V]."""
    cache, found = engine.begin(rows), []
    for place, token in enumerate(make_tokens(engine.config, STEPS)):
        tokens, places = np.full(rows, token, np.int32), np.full(rows, place, np.int32)
        logits, cache = engine.feed(cache, tokens, places)
        found.append(np.asarray(logits))
    return np.stack(found)


def test_the_model_is_the_same(sampler) -> None:
    """The user's tree stays as it is; its bytes are not copied where the form is the same."""
    engine = sampler.engine
    held = engine._stored["embedder"]["input_embedding"]
    assert isinstance(held, Rows)
    assert held.values is engine.params["embedder"]["input_embedding"]
    kernel = engine._stored["blocks.0"]["mlp_block"]["ffw_down"]["kernel"]
    given = engine.params["blocks.0"]["mlp_block"]["ffw_down"]["kernel"]
    assert (kernel.shape, kernel.ndim, kernel.dtype) == (given.shape, given.ndim, given.dtype)
    np.testing.assert_array_equal(dense(kernel), given)
    tokens = make_tokens(sampler.config, 1, STEPS)
    logits, _ = jax.jit(sampler.model.apply)(
        {"params": sampler.params}, tokens, np.arange(STEPS, dtype=np.int32)[None]
    )
    assert_close(decoded(engine, 1)[:, 0], logits[0], "logits", "bfloat16")


@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 4)], ids=["matrix", "stack"])
@pytest.mark.parametrize("rows", [1, 3])
def test_products(shape: tuple[int, ...], rows: int) -> None:
    """In each form a product is that with the array, whatever rows a stack shares or has."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kept = Rows(w.swapaxes(-1, -2))
    for leading in {(), *((n,) for n in (1, 2) if len(shape) == 3)}:
        x = jnp.asarray(rng.normal(size=(*leading, rows, 6)), jnp.float32)
        if leading or len(shape) == 2:
            np.testing.assert_allclose(product(x, kept), product(x, w), rtol=1e-5, atol=1e-6)
    gradients = [jax.grad(lambda w: product(jnp.ones((1, rows, 6)), w).sum())(z) for z in (kept, w)]
    np.testing.assert_allclose(dense(gradients[0]), gradients[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("stack", [(), (2,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("rows", [1, 2, 16, 65])
def test_few_rows_and_many(dtype: str, stack: tuple[int, ...], rows: int) -> None:
    """Sums of whole numbers are equal to the bit, whichever factor comes first."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-9, 10, (*stack, n, 8)) for n in (rows, 5))
    wide = jnp.int32 if dtype == "int8" else jnp.float32
    y = jax.jit(by_rows, static_argnums=2)(jnp.asarray(x, dtype), jnp.asarray(w, dtype), wide)
    np.testing.assert_array_equal(y, np.einsum("...zk,...nk->...zn", x, w))


@pytest.mark.parametrize(("rows", "first"), [(2, True), (64, True), (65, False)])
def test_the_matrix_is_the_first_factor(rows: int, first: bool) -> None:
    """XLA does not change the factors back where few rows make the matrix the first."""
    shapes = jax.ShapeDtypeStruct((rows, 8), "float32"), jax.ShapeDtypeStruct((5, 8), "float32")
    text = jax.jit(by_rows, static_argnums=2).lower(*shapes, jnp.float32).compile().as_text() or ""
    assert (f"f32[5,{rows}]" in text) is first


def test_rows_do_not_matter_in_int8(sampler) -> None:
    """To the bit, whatever the number of rows."""
    params = quantize_matrices(sampler.config, sampler.params, "q8")
    alone, other = (decoded(ModelEngine(sampler.model, params), rows) for rows in (1, 3))
    np.testing.assert_array_equal(other, np.broadcast_to(alone, other.shape))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if SCHEMES[name].bits == 4])
def test_four_bits_become_int8(scheme: str) -> None:
    """Quantised once more as the definition says, so off by half a step of int8 at most."""
    rng = np.random.default_rng(0)
    given = quantize(rng.normal(size=(2, 64, 24)).astype(np.float32), scheme)
    kept = as_q8(given.with_parts(jnp.asarray))
    matrix = dequantize(given)
    assert (kept.scheme, kept.zero) == ("q8", None)
    np.testing.assert_allclose(kept.scale, quantize(matrix).scale, rtol=1e-6)
    off = np.abs(np.asarray(dense(kept)) - matrix)
    assert (off <= np.asarray(kept.scale).swapaxes(-1, -2) * 0.5001).all()


def test_float32_gains_in_large_matrices(sampler) -> None:
    """Where no second copy stays behind."""
    (spec, *_) = (spec for spec in layer_spec(sampler.config) if spec.matrix)
    small, large = jnp.zeros((8, 8)), jnp.zeros((2048, 2048))
    assert isinstance(as_stored(spec, large, copies=False), Rows)
    assert as_stored(spec, large) is large
    assert as_stored(spec, small, copies=False) is small
    assert as_stored(spec._replace(matrix=False), large, copies=False) is large


def test_a_large_stack_is_not_copied() -> None:
    """As an array each matrix of a stack is copied before a product with many rows."""
    spec = next(einsum((2, 1024, 1024), None))._replace(matrix=True)
    held = as_stored(spec, jnp.zeros(spec.shape), copies=False)
    x = jax.ShapeDtypeStruct((1, 64, 1024), jnp.float32)
    memory = jax.jit(product).lower(x, held).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < held.values.nbytes // 4


def test_a_checkpoint_for_decoding() -> None:
    """Its matrices have the engine's form already, which is then not made again."""
    model, plain = load_checkpoint(dtype="bfloat16")
    model, params = load_checkpoint(dtype="bfloat16", decoding=True)
    engine = ModelEngine(model, params)
    for spec in layer_spec(model.config):
        value, given = get_path(params, spec.path), get_path(plain, spec.path)
        assert isinstance(value, Rows) == (spec.matrix or spec.table), spec.path
        assert value.shape == spec.shape
        np.testing.assert_array_equal(dense(value), given)
        held = get_path(engine._stored, spec.path)
        assert held is value or held.values is value.values


def test_four_bits_are_not_kept_beside_int8() -> None:
    model, params = load_checkpoint(quantize="q4", decoding=True)
    held = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    assert {leaf.scheme for leaf in held if isinstance(leaf, Quantized)} == {"q8"}
    engine = ModelEngine(model, params)
    pairs = zip(*map(jax.tree.leaves, (engine._stored, params)), strict=True)
    assert all(kept is given for kept, given in pairs)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_small_table_is_held_turned_too(rows: int) -> None:
    """Its own values are shared, and logits are those of the table."""
    turned = make_sampler("jax", dtype="float32").engine
    held = turned._stored["embedder"]["input_embedding"]
    assert isinstance(held, Turned)
    assert held.values is turned.params["embedder"]["input_embedding"]
    np.testing.assert_array_equal(held.columns, held.values.T)
    plain = ModelEngine(turned.model, turned.params)
    plain._stored = plain.params
    assert_close(decoded(turned, rows), decoded(plain, rows), "logits", "float32")
