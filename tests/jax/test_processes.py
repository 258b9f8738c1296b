"""Two processes on one mesh: each gives its rows, reads its parts, and writes with the other."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax.numpy", reason="jax is not installed")
from programs import TESTS

PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from recurrentgemma.jax.runtime.processes import join, processes_of
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
join(f"127.0.0.1:{port}", 2, index, 120)
from meshes import make_batch, mesh_config
from recurrentgemma.jax import (
    Model, init_params, load_checkpoint, load_parameters, load_tokenizer, make_mesh,
    save_checkpoint, save_parameters,
)
from recurrentgemma.jax import training

mesh = make_mesh("fsdp=4")
processes = processes_of(mesh)
try:
    processes.require_same("options", {"--seed": index})
    raise AssertionError
except ValueError as error:
    assert "--seed is 0 in process 0 and 1 in process 1" in str(error), error
config = mesh_config(vocab_size=2048)
model, params = Model(config, False, mesh=mesh), init_params(config, 0, mesh=mesh)
kept = sum(part.data.nbytes for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards)
assert kept == sum(leaf.nbytes for leaf in jax.tree.leaves(params)) // 2

# Read again, each process compares its parts bit for bit.
save_checkpoint(folder + "/ours", model.config, params, load_tokenizer())
save_parameters(folder + "/orbax", params)
places = jax.tree.map(lambda leaf: leaf.sharding, params)
for _, other in (load_checkpoint(folder + "/ours", mesh=mesh),
                 (None, load_parameters(folder + "/orbax", places))):
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        for a, b in zip(one.addressable_shards, two.addressable_shards, strict=True):
            assert (a.data == b.data).all()

state = training.create_train_state(model, params)
batch = make_batch("packed", 0)
state, metrics = training.train_step(state, processes.rows(batch))
training.save_state(folder + "/state", state)
expected = training.state_arrays(state)
again = training.load_state(folder + "/state", training.create_train_state(model, params))
assert all((z == expected[name]).all() for name, z in training.state_arrays(again).items())
if index == 0:
    print(float(metrics["loss"]))
"""


def test_two_processes(tmp_path: Path) -> None:
    """They train as one process does, and one process reads what they write."""
    from meshes import make_batch

    from recurrentgemma.jax import Model, init_params, load_checkpoint, training

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": TESTS}
    running = [
        subprocess.Popen([*command, str(index), port, str(tmp_path)], **pipes) for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], [
        err[-3000:] for _, err in outputs
    ]
    found = float(outputs[0][0].strip().splitlines()[-1])

    stored, _ = load_checkpoint(tmp_path / "ours")
    model, params = Model(stored.config, False), init_params(stored.config, 0)
    state = training.create_train_state(model, params)
    state, metrics = training.train_step(state, make_batch("packed", 0))
    np.testing.assert_allclose(found, float(metrics["loss"]), rtol=1e-5)
    before = training.state_arrays(state)
    loaded = training.load_state(tmp_path / "state", training.create_train_state(model, params))
    for name, array in training.state_arrays(loaded).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-3, atol=1e-5)


def test_a_coordinator_that_is_not_reached() -> None:
    from recurrentgemma.jax.runtime.processes import join

    with socket.socket() as taken:  # which does not listen
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=rf"process 1 of 2 did not reach .* {address} in 0.3 s"
        ):
            join(address, 2, 1, 0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, 0), "needs the coordinator's HOST:PORT"),
        (("host:1", 2, 2), "from 0 to 1, got 2"),
        (("host", 2, 0), "must be HOST:PORT, got 'host'"),
    ],
)
def test_mistakes(arguments: tuple, message: str) -> None:
    from recurrentgemma.jax.runtime.processes import join

    with pytest.raises(ValueError, match=message):
        join(*arguments)
