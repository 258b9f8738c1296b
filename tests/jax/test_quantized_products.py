"""Products with quantised matrices for accelerators: interpreted, and lowered without a device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_config, make_params
from jax.sharding import use_abstract_mesh
from lowering import gpu_mesh

from backends import BACKENDS
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import Quantized, dequantize, quantize, quantize_parameter
from recurrentgemma.common.quantization import product as definition
from recurrentgemma.jax.engine import ModelEngine
from recurrentgemma.jax.products import OnGPU, dense, product
from recurrentgemma.jax.runtime import pallas_products, stored
from recurrentgemma.jax.runtime.decode import functions
from recurrentgemma.jax.runtime.trees import get_path
from recurrentgemma.jax.scan import pallas_target
from tolerances import assert_close

CONFIG = make_config("RA", width=32, mlp_expanded_width=32, num_heads=2, vocab_size=32)
KERNEL = r"custom_call @\S*triton"  # in the text of a lowered program


def drawn(shape: tuple[int, ...], scheme: str, rows: int):
    """Rows, a quantised stack of matrices or one matrix, and the same on a GPU."""
    rng = np.random.default_rng(0)
    w = quantize(rng.normal(size=shape).astype(np.float32), scheme)
    x = rng.normal(size=(*shape[:-2], rows, shape[-2])).astype(np.float32)
    return x, w, on_gpu(w.with_parts(jnp.asarray))


def on_gpu(w: Quantized) -> OnGPU:
    return OnGPU(w.values, w.scale, w.zero, w.scheme, w.axis, w.dtype)


# Inputs and outputs that blocks do not divide, a stack, less than a group, and several blocks.
@pytest.mark.parametrize(
    ("scheme", "shape", "dtype"),
    [
        ("q8", (7, 5), "float16"),
        ("q8", (2, 160, 17), "bfloat16"),
        ("q4", (16, 3), "float32"),
        ("q4", (256, 20), "bfloat16"),
        ("q4_32", (2, 64, 17), "float32"),
    ],
)
def test_the_definition_whatever_the_rows(scheme: str, shape: tuple[int, ...], dtype: str) -> None:
    """No bit of a row's result depends on how many rows there are; the slope is dequantised."""
    x, held, w = drawn(shape, scheme, pallas_products.FEW)

    @jax.jit
    def run(x):
        y, pullback = jax.vjp(lambda x: product(x, w, dtype=jnp.float32), x)
        return y, product(x[..., 3:8, :], w, dtype=jnp.float32), *pullback(jnp.ones_like(y))

    rows = jnp.asarray(x, dtype)
    with pallas_target("gpu", interpret=True):
        y, some, gradient = run(rows)
    expected = definition(np.asarray(rows, np.float32), held.replace(integer=False))
    assert_close(y, expected, "logits", "float32")
    np.testing.assert_array_equal(some, y[..., 3:8, :])
    slope = np.broadcast_to(dequantize(held).sum(-1)[..., None, :], x.shape)
    np.testing.assert_allclose(gradient.astype("float32"), slope, rtol=2**-6, atol=2**-4)


def test_only_few_rows_take_the_kernel() -> None:
    """With 64-bit types, too, it is lowered; elsewhere the matrix is dequantised."""
    _, _, w = drawn((64, 6), "q4_32", 1)
    few = pallas_products.FEW
    for rows, dtype, kernels in ((few, "float32", 1), (few + 1, "float32", 0), (few, "float64", 0)):
        with jax.enable_x64(True), pallas_target("gpu"), use_abstract_mesh(gpu_mesh()):
            traced = jax.jit(product).trace(jax.ShapeDtypeStruct((rows, 64), dtype), w)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall(KERNEL, text)) == kernels
    x = jax.ShapeDtypeStruct((few, 64), "float32")
    assert "pallas_call" not in str(jax.make_jaxpr(product)(x, w.replace(integer=False)))


def test_a_kernel_that_fails_or_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (device, *_) = jax.devices("cpu")
    works, kernel = pallas_products.kernel_works.__wrapped__, pallas_products.product
    with pallas_target("gpu", interpret=True):
        assert works(device, "q4_32", "float32")
        assert not works(device, "q4_32", "float64")
        monkeypatch.setattr(pallas_products, "product", lambda *z: kernel(*z) * (1 + 2**-12))
        assert not works(device, "q4_32", "float32")
    monkeypatch.undo()
    assert not works(device, "q8", "bfloat16")  # this device does not run it
    _, held, _ = drawn((64, 6), "q4", 1)
    w = held.with_parts(jnp.asarray)
    assert stored.as_on_gpu(w) is w
    monkeypatch.setattr(pallas_products, "kernel_works", lambda *_: True)
    assert isinstance(stored.as_on_gpu(w), OnGPU)
    assert stored.as_on_gpu(w).values is w.values


def engine_for(platform: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> ModelEngine:
    """An engine as it would be where the parameters are on one device of a platform."""
    monkeypatch.setattr(stored, "_sole_platform", lambda _: platform)
    monkeypatch.setattr(pallas_products, "kernel_works", lambda *_: True)
    values, specs = make_params(CONFIG), layer_spec(CONFIG)
    held = {spec.path: quantize_parameter(spec, values[spec.path], scheme) for spec in specs}
    model, params = BACKENDS["jax"].twin.make(CONFIG, held.items(), "bfloat16")
    return ModelEngine(model, params)


def lowered_step(engine: ModelEngine, platform: str) -> str:
    """The text of a step of two rows, for a platform that need not be there."""
    tokens = jnp.zeros(2, jnp.int32)
    traced = jax.jit(functions(engine.model).feed).trace(
        engine._stored, engine.begin(2), tokens, tokens
    )
    return traced.lower(lowering_platforms=(platform,)).as_text()


def matrices(engine: ModelEngine) -> list[Quantized]:
    leaves = jax.tree.leaves(engine._stored, is_leaf=lambda z: isinstance(z, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def test_a_gpu_multiplies_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for each matrix, which takes its own bytes; nothing is kept twice."""
    engine = engine_for("gpu", "q4", monkeypatch)
    assert engine.num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    held = matrices(engine)
    assert held
    assert all(isinstance(w, OnGPU) for w in held)
    with pallas_target("gpu"), use_abstract_mesh(gpu_mesh()):
        text = lowered_step(engine, "cuda")
    assert len(re.findall(KERNEL, text)) == len(held)


@pytest.mark.parametrize("scheme", ["q8", "q4_32"])
def test_a_tpu_multiplies_int8(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product is one of int8 with int32 sums; 4 bits are int8 from loading on."""
    engine = engine_for("tpu", scheme, monkeypatch)
    held = matrices(engine)
    assert {w.scheme for w in held} == {"q8"}
    text = lowered_step(engine, "tpu")
    products = re.findall(r"dot_general.*: \((.*)\) -> tensor<\S*x(\w+)>", text)
    integer = [kind for factors, kind in products if factors.count("xi8>") == 2]
    assert integer == ["i32"] * len(held)
    path = "blocks.0.mlp_block.ffw_down.kernel"
    given, kept = (get_path(params, path) for params in (engine.params, engine._stored))
    np.testing.assert_allclose(dense(given), dense(kept), atol=2**-6)
