"""`jax.export`: programs of any number of rows and steps."""

import functools
from typing import Any

import pytest
from cases import make_batch, make_config

pytest.importorskip("jax.numpy", reason="jax is not installed")
import jax
import jax.numpy as jnp
from jax import export

from recurrentgemma.jax import Griffin, init_params
from tolerances import assert_close

CONFIG = make_config("RA")
MODEL, PARAMS = Griffin(CONFIG, False), init_params(CONFIG, 0)
# Sizes are symbols.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@jax.jit
def run(params: Any, *arguments: Any) -> Any:
    return MODEL.apply({"params": params}, *arguments)


def batch_of(rows: int, length: int) -> Any:
    """Tokens and positions."""
    return tuple(z[:rows] for z in make_batch(CONFIG, length))


@functools.cache
def exported(cached: bool, shape: str, *constraints: str) -> export.Exported:
    """The program on a prompt, or on what follows one."""
    rows, length = export.symbolic_shape(shape, constraints=constraints)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def any_rows(z: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *z.shape[1:]), z.dtype)

    cache = [jax.tree.map(any_rows, MODEL.init_cache(1))] if cached else []
    params = jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype), PARAMS)
    return export.export(run)(params, tokens, tokens, *cache)


@pytest.mark.parametrize(
    ("cached", "shape", "constraints", "sizes"),
    [
        (False, "rows, length", ("length >= 64",), (3, 77)),
        (True, "rows, 1", (), (1, 1)),
    ],
    ids=["prompt", "step"],
)
def test_any_number_of_rows_and_steps(cached: bool, shape: str, constraints, sizes) -> None:
    rows, _ = sizes
    cache = [run(PARAMS, *batch_of(rows, 9))[1]] if cached else []
    arguments: Any = (PARAMS, *batch_of(*sizes), *cache)
    logits, state = exported(cached, shape, *constraints).call(*arguments)
    expected, expected_state = run(*arguments)
    assert_close(logits, expected, "logits", "float32")
    assert state.keys() == expected_state.keys()
    for name, block in expected_state.items():
        assert_close(state[name]._asdict(), block._asdict(), "state", "float32", name=name)


def test_serialised() -> None:
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
    program = export.deserialize(exported(True, "rows, 1").serialize())
    arguments: Any = (PARAMS, *batch_of(1, 1), MODEL.init_cache(1))
    logits, state = program.call(*arguments)
    assert_close(logits, run(*arguments)[0], "logits", "float32")
    assert jax.tree.structure(state) == jax.tree.structure(arguments[-1])
