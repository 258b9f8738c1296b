"""The scan split over devices equals the scan on one."""

import subprocess
import sys

import pytest

pytest.importorskip("jax.numpy", reason="jax is not installed")

# In a process of its own: the number of devices is fixed when JAX starts.
PROGRAM = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from recurrentgemma.jax import Griffin, GriffinConfig, ShardingSpec, init_params, linear_scan

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("one", "two"))
specs = [
    ShardingSpec(mesh, batch_axis_name="one", activations_axis_name="two"),
    ShardingSpec(mesh, batch_axis_name="one", sequence_axis_name="two"),
    ShardingSpec(mesh, sequence_axis_name="one", activations_axis_name="two"),
]
rng = np.random.default_rng(0)
x, w = rng.normal(size=(2, 2, 12, 6)).astype(np.float32)
a = rng.uniform(0.3, 1, size=x.shape).astype(np.float32)
h0, v = rng.normal(size=(2, 2, 6)).astype(np.float32)

def loss(x, a, h0, reverse, spec):
    y, last = linear_scan(x, a, h0, reverse=reverse, sharding_spec=spec)
    return (y * w).sum() + (last * v).sum(), (y, last)

run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=(3, 4))
for reverse in (False, True):
    expected = jax.tree.leaves(run(x, a, h0, reverse, None))
    for spec in specs:
        actual = jax.tree.leaves(run(x, a, h0, reverse, spec))
        assert len(actual) == len(expected) == 6
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

config = GriffinConfig(
    vocab_size=16, width=8, mlp_expanded_width=8, num_heads=2, attention_window_size=4,
    block_types=("recurrent", "attention"), embeddings_scale_by_sqrt_dim=True, logits_soft_cap=0,
)
params = init_params(config, 0)
tokens = rng.integers(16, size=(2, 8))
positions = np.broadcast_to(np.arange(8), (2, 8))
for spec in specs:
    plain, _ = Griffin(config).apply({"params": params}, tokens, positions)
    split, _ = Griffin(config, scan_sharding_spec=spec).apply({"params": params}, tokens, positions)
    np.testing.assert_allclose(split, plain, rtol=1e-5, atol=1e-5)
print(len(jax.devices()), "devices agree")
"""


def test_every_axis() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 devices agree\n"
