"""Layers that repeat, run in a loop: the same values, and a program that does not grow."""

from typing import Any

import pytest
from cases import make_batch, make_config

pytest.importorskip("flax.linen")
import jax
import numpy as np
from jax.extend.core import Jaxpr
from sweeps import sweep

from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.jax import LoraOptions, Model, init_params
from recurrentgemma.jax.lora import adapt, adapted
from recurrentgemma.jax.runtime.blocks import repetitions

LORA = LoraOptions(2, quantize="q8")
SEVEN = make_config("RRARRAR")  # R R A twice, and one R is left


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("RRARRAR", (3, 2)),
        ("RRARRARR", (3, 2)),
        ("RRRR", (1, 4)),
        ("SSSSSG" * 4 + "SS", (6, 4)),
        ("RRAR", (1, 2)),
        ("AR", (1, 1)),
        ("", (0, 0)),
    ],
)
def test_the_shortest_period(kinds: str, found: tuple[int, int]) -> None:
    assert repetitions(kinds) == found


@pytest.mark.parametrize(
    ("preset", "found"),
    [("RECURRENT_GEMMA_2B_V1", (3, 8)), ("GEMMA_2B", (1, 18)), ("GEMMA3_1B", (6, 4))],
)
def test_published_models_repeat(preset: str, found: tuple[int, int]) -> None:
    assert repetitions(config_from_preset(preset).model.layers) == found


CASES = [(False, LORA), (True, None), (False, None), (True, LORA)]


@pytest.mark.parametrize(("remat", "lora"), sweep(CASES[:2], CASES))
def test_a_loop_computes_what_the_layers_do(remat: bool, lora: LoraOptions | None) -> None:
    """Logits, state and gradients; the matrices under the adapters are int8."""

    def found(scan_layers: bool) -> Any:
        model = Model(SEVEN, remat, scan_layers=scan_layers)
        params, adapters = init_params(SEVEN, 0, "float64"), None
        if lora is not None:
            params, adapters = adapt(SEVEN, params, lora, np.float64, 0)

        def loss(trained: Any, base: Any) -> Any:
            used = adapted(SEVEN, base, trained, lora) if lora else trained
            logits, state = model.apply({"params": used}, *make_batch(SEVEN, 12))
            return (logits**2).mean(), (logits, state)

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return compiled(adapters or params, params)

    with jax.enable_x64(True):
        expected, loop = found(False), found(True)
    assert jax.tree.structure(loop) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(loop), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def operations(jaxpr: Any) -> int:
    """The operations that XLA compiles: calls are counted each time, the body of a loop once."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += operations(inner) if isinstance(inner, Jaxpr) else 0
    return total


def test_what_is_compiled_does_not_grow_with_depth() -> None:
    def size(kinds: str, scan_layers: bool) -> int:
        config = make_config(kinds)
        model, params = Model(config, scan_layers=scan_layers), init_params(config, 0)
        inputs = make_batch(config, 8)

        def loss(params: Any) -> Any:
            return model.apply({"params": params}, *inputs)[0].mean()

        return operations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    assert size("RA" * 4, False) > 1.8 * size("RA" * 2, False)
    assert size("RA" * 4, True) < 1.1 * size("RA" * 2, True)


def test_a_block_unlike_the_others_is_no_part_of_a_loop() -> None:
    """One in another dtype, and a first one that makes the hidden states wider."""
    config = make_config("RRRR")
    tokens = make_batch(config, 8)
    for changed in ("blocks.2", "embedder"):
        params = dict(init_params(config, 0, "float32"))
        params[changed] = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params[changed])
        one, other = (
            Model(config, scan_layers=scan).apply({"params": params}, *tokens)[0]
            for scan in (False, True)
        )
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
