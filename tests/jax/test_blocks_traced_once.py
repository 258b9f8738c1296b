"""Blocks of one kind are traced and lowered once, whatever the depth of the model."""

from collections.abc import Iterator
from typing import Any

import pytest
from cases import make_batch, make_config

pytest.importorskip("flax.linen")
import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import Jaxpr

from recurrentgemma.jax import LoraOptions, Model, init_params
from recurrentgemma.jax.blocks import MLPBlock
from recurrentgemma.jax.lora import adapt, adapted

LORA = LoraOptions(2)


def inner_programs(jaxpr: Any) -> Iterator[Any]:
    """The programs that a program calls, and those that these call."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if isinstance(inner, Jaxpr):
                yield inner
                yield from inner_programs(inner)


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
@pytest.mark.parametrize("remat", [False, True], ids=["stored", "recomputed"])
def test_a_program_does_not_grow_with_depth(remat: bool, lora: LoraOptions | None) -> None:
    def equations(kinds: str) -> int:
        config = make_config(kinds)
        model, params = Model(config, remat), init_params(config, 0)
        adapters: Any = {}
        if lora:
            params, adapters = adapt(config, params, lora, np.float32, 0)

        def loss(params: Any, adapters: Any) -> Any:
            used = adapted(config, params, adapters, lora) if lora else params
            return model.apply({"params": used}, *make_batch(config, 8))[0].mean()

        jaxpr = jax.make_jaxpr(jax.grad(loss, int(lora is not None)))(params, adapters).jaxpr
        return sum(len(program.eqns) for program in {jaxpr, *inner_programs(jaxpr)})

    # A block adds its calls, and what joins them; without sharing it would be near twice as many.
    assert equations("RA" * 4) < 1.2 * equations("RA" * 2)


def test_interceptors_see_the_blocks_of_a_model_that_was_traced_before() -> None:
    config = make_config("RA")
    model, params = Model(config), init_params(config, 0)
    tokens, segment_pos = make_batch(config, 8)
    logits, _ = model.apply({"params": params}, tokens, segment_pos)
    seen = []

    def double_the_mlp(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(".".join(context.module.path))
        y = call(*args, **kwargs)
        return 2 * y if isinstance(context.module, MLPBlock) and isinstance(y, jax.Array) else y

    with nn.intercept_methods(double_the_mlp):
        doubled, _ = model.apply({"params": params}, tokens, segment_pos)
    assert {"blocks.0.mlp_block", "blocks.1.mlp_block.ffw_up"} <= {*seen}
    assert np.abs(doubled - logits).max() > 1e-2
    again, _ = model.apply({"params": params}, tokens, segment_pos)
    np.testing.assert_array_equal(again, logits)
