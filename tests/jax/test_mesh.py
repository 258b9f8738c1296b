"""A model on a mesh of eight devices computes what it does on one, and each has its part."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax.numpy", reason="jax is not installed")
from meshes import EIGHT_DEVICES, make_batch, mesh_config
from programs import run_programs

from recurrentgemma.common.io.tensor_files import TensorFile

SETTING = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from meshes import MESHES, difference, make_batch, mesh_config, trained
from recurrentgemma.jax import Model, create_train_state, init_params, make_mesh, train_step
"""
# Each strategy once; scripts/sharding_grid.py has all methods with each. Two meshes with one method
# share a device's program, and STATES the programs of the last mesh.
TRAINING = """
from recurrentgemma.jax.training import layout_of
methods = ("sgd", "adafactor", "lora on int8", "lora on int8", "adamw", "adamw")
cases = zip(methods, MESHES, ("packed", "padded") * 3, strict=True)
for method, mesh, kind in cases:
    state, metrics = trained(method, kind, mesh)
    found = difference((state, metrics), trained(method, kind, None))
    assert found <= 1e-10, (method, mesh, kind, found)
    layout = layout_of(state)
    assert not layout.misplaced, layout
    if mesh == "fsdp=8":
        kept = {name: p for name, p in layout.items() if name.startswith("parameters.")}
        whole = sum(np.prod(p.shape) * np.dtype(p.dtype).itemsize for p in kept.values())
        assert sum(p.num_bytes for p in kept.values()) <= 1.02 * whole / 8
"""
PROGRAM = """
from recurrentgemma.common.traffic import traffic
from recurrentgemma.jax.runtime.ahead_of_time import lower_step
from recurrentgemma.jax.runtime.collectives import collectives, sent_bytes

config, rows, length = mesh_config(), 8, 24
shapes = {leaf.shape for leaf in jax.tree.leaves(init_params(config, 0))}

def program(mesh):
    return lower_step(config, make_mesh(mesh), rows, length, dtype="float32").compile()

alone = program("data=1").cost_analysis()["flops"]
for mesh in ("data=8", "fsdp=8", "sequence=8", "fsdp=2,tensor=4"):
    made = program(mesh)
    text = made.as_text()
    gathers = [c for c in collectives(text) if c.kind == "all-gather"]
    found = [s[1:] if s[0] == 1 else s for c in gathers for s in c.shapes]  # one of a stack
    # Only weights are gathered, or the parts that "tensor" leaves: no activation, not the table.
    assert not [s for s in found if {24, 192} & {*s} or s == (256, 64)], (mesh, found)
    assert bool(found) == (mesh != "data=8"), mesh
    if mesh == "data=8":
        assert made.cost_analysis()["flops"] * 8 <= 1.25 * alone, (made.cost_analysis(), alone)
    if mesh in ("fsdp=8", "sequence=8"):
        assert {*found} <= shapes, (mesh, found)
        sent = sent_bytes(text)
        expected = traffic(config, {mesh[:-2]: 8}, rows, length, "float32").collectives
        # XLA on a CPU adds gradients up on all devices, which sends twice as much.
        sent["reduce-scatter"] = sent["all-reduce"] / 2
        # Some versions merge a block's second gather, for its recomputation, with the first.
        if sent["all-gather"] < 0.75 * expected["all-gather"]:
            sent["all-gather"] *= 2
        for kind in ("all-gather", "reduce-scatter", "collective-permute"):
            assert abs(sent[kind] / expected[kind] - 1) <= 0.02, (mesh, kind, sent, expected)
"""
# `Compiled` refuses arguments that differ from those without weights, in shape, dtype or place.
ADAPTERS = """
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.jax.runtime.ahead_of_time import lower_step
from recurrentgemma.jax.sharding import on_mesh, token_split
from recurrentgemma.jax.training import evaluate

config, made = mesh_config(), make_mesh("fsdp=2,tensor=4")
given = make_batch("packed", 0)
kinds = np.int32, np.int32, np.int32, np.float32
place = on_mesh(made, None, *token_split(made, 8, 24))
batch = Batch(*(jax.device_put(np.asarray(part, kind)[None], place)
                for part, kind in zip(given, kinds, strict=True)))
for scheme in ("q8", "q4_32"):
    lora = LoraOptions(rank=4, quantize=scheme)
    params = init_params(config, 0, "bfloat16", mesh=made)
    state = create_train_state(Model(config, mesh=made), params, lora=lora)
    expected = evaluate(state, [given])["loss"]
    step = lower_step(config, made, 8, 24, lora=lora).compile()
    metrics = step(state.parameters, state.optimizer_state, state.base, batch, 1e-4)[-1]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
"""
LOSS = """
from jax.extend import core
from recurrentgemma.jax.loss import cross_entropy

def operations(jaxpr):
    "Multiplications of all matrix products, on one device, loops counted."
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            contracted = np.prod([eqn.invars[0].aval.shape[i] for i in left])
            total += contracted * eqn.outvars[0].aval.size
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            total += times * operations(inner) if hasattr(inner, "eqns") else 0
    return total

x, table = rng.normal(size=(8, 6, 4)), rng.normal(size=(64, 4))
targets, weights = rng.integers(64, size=(8, 6)), rng.uniform(size=(8, 6))

def gradients(mesh, x, table):
    loss = lambda x, table: cross_entropy(x, table, targets, weights, 5.0, 12, mesh)
    return jax.value_and_grad(loss, (0, 1))(x, table)

alone = operations(jax.make_jaxpr(lambda *z: gradients(None, *z))(x, table).jaxpr)
assert alone == 3 * 48 * 64 * 4
expected = jax.jit(lambda *z: gradients(None, *z))(x, table)
for mesh in ("data=8", "tensor=4", "fsdp=2,tensor=4", "fsdp=8", "sequence=2", "fsdp=2,sequence=2"):
    made = make_mesh(mesh)
    run = jax.jit(lambda *z: gradients(made, *z))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
                 run(x, table), expected)
    found = operations(jax.make_jaxpr(lambda *z: gradients(made, *z))(x, table).jaxpr)
    # The ring computes logits twice.
    extra = 4 / 3 if mesh == "fsdp=8" or "sequence" in mesh else 1
    assert found * made.size == extra * alone, (mesh, found, alone)
"""
# A short reach in blocks, and none; what `hidden` returns, and its gradients.
ATTENTION = """
import dataclasses
from recurrentgemma.common.model.config import Layer, ModelConfig
from recurrentgemma.common.model.mixers import Attention, Rope
from recurrentgemma.jax.sharding import put, shardings

local = Attention(4, 2, 16, 3, Rope(), scale=0.5, qk_norm=True)
mixers = local, dataclasses.replace(local, reach=None, soft_cap=2.0)
config = ModelConfig(vocab_size=64, width=64, layers=tuple(Layer(m, 128, False) for m in mixers))
batch = make_batch("padded", 0, 64)

def outputs(mesh):
    model = Model(config, mesh=mesh and make_mesh(mesh))
    params = init_params(config, 0, "float64", mesh=model.mesh)

    def loss(params):
        hidden, cache = model.apply({"params": params}, *batch[:2], method=model.hidden)
        return (hidden * jnp.asarray(batch.weights)[..., None]).sum(), cache

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return found(params), found.lower(params).compile().as_text()

expected, _ = outputs(None)
found, text = outputs("sequence=2")
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
             found, expected)
"""
# One state goes from eight devices to (2, 2), eight, one, and in the end to the other twin.
STATES = """
from pathlib import Path
from recurrentgemma.common.io.tensor_files import write_tensors
from recurrentgemma.jax.training import (
    evaluate, load_state, load_state_arrays, save_state, state_arrays,
)
folder = Path(FOLDER)
state, _ = trained("adamw", "packed", "fsdp=2,tensor=4", steps=1)
save_state(folder / "0", state)
try:
    save_state(folder / "0", state)
    raise AssertionError
except ValueError as error:
    assert "force=True" in str(error)
expected, losses = state_arrays(state), []
for step, mesh in enumerate(("fsdp=2,tensor=2", "fsdp=8", None)):
    other, _ = trained("adamw", "packed", mesh, steps=0)
    state = load_state(folder / str(step), other)
    for loaded in (state, load_state_arrays(other, expected)):
        found = state_arrays(loaded)
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in expected)
        for one, before in zip(*map(jax.tree.leaves, (loaded.parameters, other.parameters))):
            assert one.sharding == before.sharding
    save_state(folder / str(step + 1), state)
    losses.append(evaluate(state, [make_batch("packed", 2)])["loss"])
assert np.ptp(losses) <= 1e-13 * losses[0], losses
write_tensors(folder / "state.safetensors", state_arrays(state), {})  # as a run keeps it
np.save(folder / "losses.npy", losses)
"""
SAMPLER = """
from recurrentgemma.jax import load_checkpoint, load_tokenizer, Sampler
vocab = load_tokenizer()
def texts(mesh, rows):
    model, params = load_checkpoint(dtype="float32", mesh=mesh)
    sampler = Sampler(model, vocab, params)
    sampler.engine.prefill_chunks = (4, 1)
    tokens = sampler(["The river", "A mill", "In spring", "It"][:rows], 3).tokens
    return [np.asarray(row).tolist() for row in tokens], params
alone, _ = texts(None, 4)
for mesh, rows in (("fsdp=4", 4), ("fsdp=2,tensor=2", 1)):
    found, params = texts(make_mesh(mesh), rows)
    assert found == alone[:rows]
    parts = [max(s.data.nbytes for s in leaf.addressable_shards)
             for leaf in jax.tree.leaves(params)]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(parts) <= 1.1 * whole / 4, (sum(parts), whole)
"""
MISTAKES = """
import re
def refused(message, call):
    try:
        call()
    except ValueError as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(message)

from recurrentgemma.jax import load_checkpoint, loss_fn
from recurrentgemma.jax.training import layout_of
from recurrentgemma.common.training.batch import Batch
refused("fsdp.sequence, got sequence=2,tensor=4, which is", lambda: make_mesh("sequence,tensor=4"))
refused("needs 16 devices, there are 8", lambda: make_mesh({"data": 16}))
mesh = make_mesh("fsdp=8")
refused("a device, a sharding or a mesh", lambda: load_checkpoint(sharding="replicated", mesh=mesh))
refused("tensor=8 must divide the number of .* 1, 2 or 4",
        lambda: init_params(mesh_config(), 0, mesh=make_mesh("tensor=8")))
state = create_train_state(Model(mesh_config(), mesh=mesh), init_params(mesh_config(), 0))
assert not layout_of(state).misplaced  # laid out, though the parameters were not
few = Batch(*(z[:3] for z in make_batch("packed", 0)))
refused("rows .* divisible by fsdp=8: .* got 3 rows", lambda: train_step(state, few))
mesh = make_mesh("sequence=8")
apart = create_train_state(Model(mesh_config(), mesh=mesh), init_params(mesh_config(), 0))
short = Batch(*(z[:, :20] for z in make_batch("packed", 0)))
refused("tokens .* divisible by sequence=8, got 20", lambda: train_step(apart, short))
alone = create_train_state(Model(mesh_config()), init_params(mesh_config(), 0))
refused("a layout needs a model on a mesh", lambda: layout_of(alone))
"""
# On several CPU devices, a program that JAX reads from its cache can wait forever.
CACHE = """
import tempfile
from pathlib import Path
from jax.experimental.compilation_cache.compilation_cache import reset_cache

with tempfile.TemporaryDirectory() as folder:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    reset_cache()
    jax.jit(lambda x: x + 1)(1.0)
    make_mesh("fsdp=1")
    jax.jit(lambda x: x + 2)(1.0)
    kept = len(list(Path(folder).iterdir()))
    assert kept >= 2, kept
    make_mesh("fsdp=8")
    jax.jit(lambda x: x + 3)(1.0)
    assert len(list(Path(folder).iterdir())) == kept
jax.config.update("jax_compilation_cache_dir", None)
"""
PROGRAMS = {
    "compilation cache": CACHE,
    "training": TRAINING,
    "compiled program": PROGRAM,
    "adapters compiled": ADAPTERS,
    "attention": ATTENTION,
    "loss": "rng = np.random.default_rng(0)" + LOSS,
    "states": STATES,
    "sampler": SAMPLER,
    "mistakes": MISTAKES,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where "states" writes."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def failures(folder: Path) -> dict[str, str]:
    """The programs that failed, with their tracebacks."""
    setting = f"{SETTING}FOLDER = {str(folder)!r}\n"
    programs = {name: setting + program for name, program in PROGRAMS.items()}
    return run_programs(programs, EIGHT_DEVICES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_meshes(failures: dict[str, str], name: str) -> None:
    assert name not in failures, failures[name]


def test_the_other_twin_resumes(failures: dict[str, str], folder: Path) -> None:
    """It has the arrays to the bit; its loss is within rounding."""
    pytest.importorskip("torch.utils", reason="torch is not installed")
    import torch

    assert "states" not in failures, failures["states"]
    from recurrentgemma import torch as twin

    file = TensorFile(folder / "state.safetensors")
    expected = {name: file.read(name) for name in file.tensors}
    model = twin.Griffin(mesh_config(), dtype=torch.float64)
    state = twin.create_train_state(model, state_dtype=torch.float64)
    state = twin.load_state_arrays(state, expected)
    found = twin.state_arrays(state)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    loss = twin.evaluate(state, [make_batch("packed", 2)])["loss"]
    np.testing.assert_allclose(loss, np.load(folder / "losses.npy"), rtol=1e-12)
