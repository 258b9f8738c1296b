"""The recurrence under JAX's transforms: jit, vmap and their gradients.

Not the Pallas kernels: those are in test_pallas.py.
"""

import numpy as np
import pytest
from scans import Implementation, implementations, make_scan

from backends import BACKENDS
from tolerances import assert_close

pytest.importorskip("jax.numpy", reason="jax is not installed")


@pytest.fixture(
    scope="module", params=[p for p in implementations("jax") if "pallas" not in str(p.id)]
)
def jax_scan(request: pytest.FixtureRequest) -> Implementation:
    return request.param


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_jit_vmap_and_gradients(jax_scan: Implementation, reverse: bool) -> None:
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import linear_scan

    case = make_scan(3, 9, 5)
    with jax.enable_x64(True):
        x, a, h0, reset = BACKENDS["jax"].scan_arguments(*case.inputs, dtype="float64")

        def run(x, a, h0, reset):
            return linear_scan(x, a, h0, reset, reverse=reverse, implementation=jax_scan.name)

        compiled = jax.jit(run)
        for got, want in zip(compiled(x, a, h0, reset), run(x, a, h0, reset), strict=True):
            assert_close(np.asarray(got), np.asarray(want), "state", "float64")

        several = jnp.stack([x, 2 * x, x[::-1]], -1)
        starts = jnp.stack([h0, h0 + 1, h0[::-1]], 0)
        axes = (-1, None, 0, None)
        mapped = jax.jit(jax.vmap(run, axes))
        nothing = mapped(several[..., :0], a, starts[:0], reset)
        assert [z.shape for z in nothing] == [(0, *x.shape), (0, *h0.shape)]
        actual = mapped(several, a, starts, reset)
        expected = [compiled(several[..., i], a, starts[i], reset) for i in range(3)]
        for got, want in zip(actual, zip(*expected, strict=True), strict=True):
            assert_close(np.asarray(got), np.stack(want), "state", "float64")

        def loss(x, a, h0, reset):
            y, last = run(x, a, h0, reset)
            return jnp.vdot(y, case.dy) + jnp.vdot(last, case.dlast)

        def total(x, a, h0, reset):
            return jax.vmap(loss, axes)(x, a, h0, reset).sum()

        grad = jax.jit(jax.grad(loss, (0, 1, 2)))
        each = [grad(several[..., i], a, starts[i], reset) for i in range(3)]
        stacked = [np.stack(parts) for parts in zip(*each, strict=True)]
        dx, da, dh0 = jax.jit(jax.grad(total, (0, 1, 2)))(several, a, starts, reset)
        assert_close(np.moveaxis(np.asarray(dx), -1, 0), stacked[0], "gradient", "float64")
        assert_close(np.asarray(da), stacked[1].sum(0), "gradient", "float64")
        assert_close(np.asarray(dh0), stacked[2], "gradient", "float64")
        vmapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), axes))(several, a, starts, reset)
        for got, want in zip(vmapped, stacked, strict=True):
            assert_close(np.asarray(got), want, "gradient", "float64")
