"""The scan split over devices equals the scan on one."""

from typing import Any

import numpy as np
import pytest
from meshes import EIGHT_DEVICES
from programs import run_programs

pytest.importorskip("jax.numpy", reason="jax is not installed")

EVERY_AXIS = """
mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("one", "two"))
specs = [
    ShardingSpec(mesh, batch_axis_name="one", activations_axis_name="two"),
    ShardingSpec(mesh, batch_axis_name="one", sequence_axis_name="two"),
    ShardingSpec(mesh, sequence_axis_name="one", activations_axis_name="two"),
]
x, w = rng.normal(size=(2, 2, 12, 6)).astype(np.float32)
a = rng.uniform(0.3, 1, size=x.shape).astype(np.float32)
h0, v = rng.normal(size=(2, 2, 6)).astype(np.float32)

def loss(x, a, h0, reverse, spec):
    y, last = linear_scan(x, a, h0, reverse=reverse, sharding_spec=spec)
    return (y * w).sum() + (last * v).sum(), (y, last)

run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=(3, 4))
for reverse in (False, True):
    expected = jax.tree.leaves(run(x, a, h0, reverse, None))
    for spec in sweep(specs[reverse : 2 + reverse], specs):  # a split sequence both ways
        actual = jax.tree.leaves(run(x, a, h0, reverse, spec))
        assert len(actual) == len(expected) == 6
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

tokens = rng.integers(16, size=(2, 8))
positions = np.broadcast_to(np.arange(8), (2, 8))
plain, _ = jax.jit(Griffin(config).apply)({"params": params}, tokens, positions)
for spec in sweep(specs[::2], specs):  # each axis once
    model = Griffin(config, scan_sharding_spec=spec)
    split, _ = jax.jit(model.apply)({"params": params}, tokens, positions)
    np.testing.assert_allclose(split, plain, rtol=1e-5, atol=1e-5)
assert len(jax.devices()) == 8
"""
SETTING = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lowering import gpu_mesh
from sweeps import sweep
from recurrentgemma.jax import (
    Griffin, GriffinConfig, ShardingSpec, init_params, linear_scan, rg_lru_scan
)
from recurrentgemma.jax.scan import pallas_target

rng = np.random.default_rng(0)
config = GriffinConfig(
    vocab_size=16, width=8, mlp_expanded_width=8, num_heads=2, attention_window_size=4,
    block_types=("recurrent", "attention"), embeddings_scale_by_sqrt_dim=True, logits_soft_cap=0,
)
params = init_params(config, 0)

def check(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
"""
ANY_SIZE = """
mesh = jax.make_mesh((2, 2), ("one", "two"), axis_types=(AxisType.Auto,) * 2)
spec = ShardingSpec(mesh, batch_axis_name="one", sequence_axis_name="two")
w, x, a, gate = rng.normal(size=(4, 1, 7, 5)).astype(np.float32)
a = np.tanh(a)

def loss(x, a, gate, spec):
    y, h = linear_scan(x, a, sharding_spec=spec, reverse=True)
    position = np.arange(x.shape[1])[None] - 1
    y, last = rg_lru_scan(y, gate, a, a[0, 0], position, h, sharding_spec=spec)
    return (y * w[:, : x.shape[1]]).sum() + (last ** 2).sum(), (y, last)

run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
for length in (7, 1):
    arguments = x[:, :length], a[:, :length], gate[:, :length]
    check(run(*arguments, spec), run(*arguments, None))

# What is forgotten, on another device: nothing is left.
endless = x.copy()
endless[:, 0] = np.inf
reset = np.arange(7)[None] == 5
for scan_spec in (spec, None):
    y, last = jax.jit(lambda x: linear_scan(x, a, None, reset, sharding_spec=scan_spec))(endless)
    assert np.isfinite(y[:, 5:]).all()
    assert np.isfinite(last).all()

plain, model = Griffin(config), Griffin(config, scan_sharding_spec=spec)
tokens, positions = rng.integers(16, size=(1, 6)), np.arange(6)[None]
jax.jit(model.init)(jax.random.key(0), tokens[:, :1], positions[:, :1])
apply = jax.jit(model.apply)
state = apply({"params": params}, tokens[:, :5], positions[:, :5])[1]
step = apply({"params": params}, tokens[:, 5:], positions[:, 5:], state)[0]
check(step, jax.jit(plain.apply)({"params": params}, tokens, positions)[0][:, 5:])
"""
EXPLICIT_AXES = """
mesh = jax.make_mesh((2, 2), ("one", "two"), axis_types=(AxisType.Explicit,) * 2)
spec = ShardingSpec(mesh, batch_axis_name="one", sequence_axis_name="two")
x, a = rng.normal(size=(2, 2, 8, 4)).astype(np.float32)
a = np.tanh(a)

def loss(x, a, spec):
    y, last = linear_scan(x, a, sharding_spec=spec)
    return (y ** 2).sum() + (last ** 2).sum(), (y, last)

run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
expected = run(x, a, None)
check(linear_scan(x, a, sharding_spec=spec), expected[0][1])
with jax.set_mesh(mesh):
    check(run(x, a, spec), expected)
    placed = jax.device_put((x, a), spec.activations_sharding)
    actual = run(*placed, spec)
    check(actual, expected)
    assert actual[0][1][0].sharding.spec == spec.activations_sharding_spec
    assert actual[0][1][1].sharding.spec == spec.rnn_state_sharding_spec
    tokens, positions = rng.integers(16, size=(2, 5)), np.tile(np.arange(5), (2, 1))
    model = Griffin(config, scan_sharding_spec=spec)
    logits, _ = jax.jit(model.apply)({"params": params}, tokens, positions)
check(logits, jax.jit(Griffin(config).apply)({"params": params}, tokens, positions)[0])
"""
INSIDE_SHARD_MAP = """
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split = PartitionSpec("data")
x, a = rng.normal(size=(2, 4, 20, 3)).astype(np.float32)
a = np.tanh(a[:1])

def gradients(scan):
    return jax.jit(jax.grad(lambda x, a: (scan(x, a)[0] ** 2).sum(), (0, 1)))

for name, length in (("auto", 5), ("xla", 20), ("associative", 20)):  # auto: reference
    def scan(x, a):
        a = jnp.broadcast_to(a, x.shape)
        y, _ = linear_scan(x, a, implementation=name)
        position = jnp.broadcast_to(jnp.arange(length), x.shape[:2])
        return rg_lru_scan(y, a, x, a[0, 0], position, implementation=name)

    def alone(x, a):  # of the rows that a device has
        return linear_scan(x, a, implementation=name)

    mapped = jax.shard_map(scan, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split)
    check(gradients(mapped)(x[:, :length], a[:, :length]),
          gradients(scan)(x[:, :length], a[:, :length]))
    alone = jax.shard_map(alone, mesh=mesh, in_specs=split, out_specs=split)
    (alone if name == "auto" else jax.jit(alone))(x, x)  # once without jit, which is slow

def loss(params, tokens, positions):
    return Griffin(config).apply({"params": params}, tokens, positions)[0].sum()[None]

tokens, positions = rng.integers(16, size=(4, 9)), np.tile(np.arange(9), (4, 1))
mapped = jax.shard_map(
    loss, mesh=mesh, in_specs=(PartitionSpec(), split, split), out_specs=split
)
actual, expected = (
    jax.jit(jax.grad(lambda params: f(params, tokens, positions).sum()))(params)
    for f in (mapped, loss)
)
jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-4), actual, expected)

def rg_lru(x):
    position = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return rg_lru_scan(x, x, x, x[0, 0], position)[0]

targets = ("tpu", "tpu", mesh), ("cuda", "gpu", gpu_mesh((4,), ("data",)))
for platform, target, mesh in targets:
    x = jax.ShapeDtypeStruct((4, 300, 128), "float32", sharding=NamedSharding(mesh, split))
    for scan in (lambda x: linear_scan(x, x)[0], rg_lru):
        mapped = jax.shard_map(scan, mesh=mesh, in_specs=split, out_specs=split)
        with pallas_target(target):
            traced = jax.jit(jax.grad(lambda x: mapped(x).sum())).trace(x)
        traced.lower(lowering_platforms=(platform,))
"""

MODELS = """
import dataclasses

from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.optimization import OptimizerOptions
from recurrentgemma.jax import linear_scan
from recurrentgemma.jax.training import create_train_state, loss_fn, train_step
from samplers import make_sampler

config = dataclasses.replace(config, width=16, mlp_expanded_width=16, num_heads=4,
                             vocab_size=2048, attention_window_size=8, logits_soft_cap=30.0)
params = init_params(config, 0, "float64")
model = Griffin(config, gradient_checkpointing=False)
tokens, positions = rng.integers(2048, size=(4, 8)), np.tile(np.arange(8), (4, 1))
batch = Batch(tokens, positions, np.roll(tokens, -1, 1), np.ones((4, 8)))

@jax.jit
def run(params, batch):
    tokens, positions = batch[:2]
    whole, cache = model.apply({"params": params}, tokens[:, :7], positions[:, :7])
    step, cache = model.apply({"params": params}, tokens[:, 7:], positions[:, 7:], cache)
    return whole, step, cache, loss_fn(model, params, batch)[0]

def train(params, batch):
    state = create_train_state(model, params, state_dtype="float64")
    state, metrics = train_step(state, batch)
    return state.parameters, metrics["loss"], metrics["grad_norm"]

def partition(z):
    "Tensor parallel in the last axis that four divide, and fully sharded in one before it."
    axes = [None] * z.ndim
    for name, devices in (("tensor", 4), ("fsdp", 2)):
        free = [i for i, n in enumerate(z.shape) if n % devices == 0 and axes[i] is None]
        if free:
            axes[free[-1]] = name
    return PartitionSpec(*axes)

def close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)

expected, trained = run(params, batch), train(params, batch)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    placed = jax.tree.map(lambda z: jax.device_put(z, NamedSharding(mesh, partition(z))), params)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    split = Batch(*(jax.device_put(z, rows) for z in batch))
    actual = run(placed, split)
    close(actual, expected)
    new, *metrics = train(placed, split)
    close((new, *metrics), trained)
    if kind is AxisType.Explicit:
        assert actual[0].sharding.spec == PartitionSpec("fsdp", None, None)
        table = new["embedder.input_embedding"]
        assert table.sharding.spec == placed["embedder"]["input_embedding"].sharding.spec
        x = jax.device_put(rng.normal(size=(4, 20, 3)), rows)
        close(linear_scan(x, x), linear_scan(*[np.asarray(x)] * 2))

def generated(params):
    "One row of the batch, greedily."
    sampler = make_sampler("jax", config=config, dtype="float64")
    sampler.params, sampler.engine.prefill_chunks = params, (4, 1)
    return sampler([[2, 5, 7]], 2, end_sampling_at_eos_token=False).tokens

close(generated(placed), generated(params))
create_train_state(model, placed, optimizer=OptimizerOptions(name="adafactor"))
"""


PROGRAMS = {
    "every axis": EVERY_AXIS,
    "any size": ANY_SIZE,
    "explicit axes": EXPLICIT_AXES,
    "inside shard_map": INSIDE_SHARD_MAP,
    "models": "jax.config.update('jax_enable_x64', True)" + MODELS,
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """The programs that failed, with their tracebacks."""
    programs = {name: SETTING + program for name, program in PROGRAMS.items()}
    return run_programs(programs, EIGHT_DEVICES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_meshes(failures: dict[str, str], name: str) -> None:
    assert name not in failures, failures[name]


def test_without_a_mesh() -> None:
    """What a spec without a mesh can say: that the arrays are split already."""
    from recurrentgemma.jax import ShardingSpec, linear_scan

    x = np.ones((1, 9, 2), np.float32)
    y, _ = linear_scan(x, x, sharding_spec=ShardingSpec(batch_axis_name="data"))
    np.testing.assert_array_equal(y[0, -1], [9, 9])
    with pytest.raises(ValueError, match=r"must have a mesh .* 9 steps over, got mesh=None"):
        linear_scan(x, x, sharding_spec=ShardingSpec(sequence_axis_name="data"))
    with pytest.raises(ValueError, match="needs ShardingSpec's mesh, got None"):
        _ = ShardingSpec().rnn_state_sharding


@pytest.mark.usefixtures("unchecked_types")
def test_a_spec_where_a_switch_goes() -> None:
    from cases import make_config

    from recurrentgemma.jax import Griffin, ShardingSpec

    unusual: Any = ShardingSpec()
    with pytest.raises(ValueError, match=r"must be a bool, got ShardingSpec.*by name"):
        Griffin(make_config("RA"), unusual)


@pytest.mark.parametrize("length", [0, 3, 20])
def test_numpy_arrays(length: int) -> None:
    from jax import Array

    from recurrentgemma.jax import linear_scan, rg_lru_scan

    x, h0 = np.ones((1, length, 2), np.float32), np.ones((1, 2), np.float32)
    position = np.arange(length)[None]
    for outputs in (
        linear_scan(x, x, h0, position == 0),
        rg_lru_scan(x, x, x, h0[0], position, h0),
    ):
        assert [output.shape for output in outputs] == [x.shape, h0.shape]
        assert all(isinstance(output, Array) for output in outputs)
