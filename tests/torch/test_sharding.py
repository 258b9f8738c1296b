"""A model split over processes: each has its part, and together they compute what one does.

HYPOTHESIS_PROFILE=long runs the whole grid, also on four processes.
"""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import numpy as np
import sharded
import torch
import torch.distributed as dist
from cases import make_config
from processes import Processes
from sharded import CONFIG, OPTIONS, PARTS, STRATEGIES, config_of, count_of, params_of
from sweeps import sweep
from trainers import make_batch

from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.common.model.mixers import Attention, Rope
from recurrentgemma.common.model.presets import Preset
from recurrentgemma.common.traffic import traffic
from recurrentgemma.torch import (
    Griffin,
    GriffinConfig,
    LoraOptions,
    create_train_state,
    layout_of,
    load_checkpoint,
    loss_fn,
)
from recurrentgemma.torch.runtime.teams import key_heads
from recurrentgemma.torch.sharding import shard
from tolerances import assert_close

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is without distributed")

PARAMS = params_of(CONFIG)
BATCHES, PART_BATCHES = (  # packed and padded rows
    [make_batch(config, seed, rows=4, length=16) for seed in range(3)] for config in (CONFIG, PARTS)
)
GRID = [(options, mesh) for mesh in STRATEGIES for options in OPTIONS]
SHORT = [
    *((options, mesh) for mesh in ("fsdp=2", "tensor=2") for options in OPTIONS),
    ("adamw", "data=2"),
    ("adamw", "sequence=2"),
    ("lora q8", "sequence=2"),
    ("adamw", "fsdp=2,tensor=2"),
]


class Pools(dict[int, Processes]):
    """Groups of processes, by how many they are."""

    def __missing__(self, count: int) -> Processes:
        self[count] = Processes(count)
        return self[count]


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.mark.parametrize("mesh", sweep(["fsdp=2"], ["fsdp=2", "tensor=2", "sequence=2"]))
def test_a_checkpoint_is_read_in_parts_and_saved_as_a_whole(pools, tmp_path, mesh) -> None:
    pools[2].run(sharded.check_loading, tmp_path / "saved", mesh)


@pytest.mark.parametrize("mesh", sweep(["tensor=2"], STRATEGIES))
def test_a_team_samples_what_one_process_does(pools, mesh) -> None:
    pools[count_of(mesh)].run(sharded.check_sampling, PARTS, params_of(PARTS), mesh)


@pytest.mark.parametrize(("dtype", "mesh"), [("float32", "fsdp=2"), ("bfloat16", "tensor=2")])
def test_initial_values_are_those_of_one_process(pools, dtype, mesh) -> None:
    torch.manual_seed(7)
    config, dtype = config_of(mesh), getattr(torch, dtype)
    expected = Griffin(config, dtype=dtype).state_dict()
    for values in pools[2].run(sharded.draw, config, 7, dtype, mesh):
        assert list(values) == list(expected)
        for name, value in values.items():
            np.testing.assert_array_equal(value, expected[name].float().numpy(), err_msg=name)


@pytest.mark.parametrize(("options", "mesh"), sweep(SHORT, GRID))
def test_three_steps_are_those_of_one_process(pools, options, mesh) -> None:
    count, config, settings = count_of(mesh), config_of(mesh), OPTIONS[options]
    params, batches = params_of(config), BATCHES if config is CONFIG else PART_BATCHES
    found, *_ = pools[count].run(sharded.train, config, params, mesh, settings, batches)
    expected = sharded.steps(sharded.state_of(config, params, None, settings), batches)
    sizes, misplaced, requested = map(found.pop, ("bytes", "misplaced", "requested"))
    assert_close(found, expected, "state", "float64")
    # What FSDP splits by rows though the layout keeps it whole: axes that no mesh axis divides.
    # The scale of an int8 matrix has a 1 where the matrix may be split.
    assert all(name.endswith((".kernel.scale", ".w.scale")) for name in misplaced), misplaced
    assert max(sizes)[0] <= 1.1 * requested
    if "lora" not in options:  # of adapters "tensor" leaves the sides whole that the stream enters
        state = sharded.state_of(config, params, None, settings)
        parts = 1 if mesh.startswith("data") else count
        ideal = layout_of(sharded.train_step(state, batches[0])[0]).num_bytes / parts
        assert max(sizes)[0] <= 1.1 * ideal


def test_a_step_sends_blocks_twice_and_gradients_once(pools) -> None:
    sizes: dict[str, int] = {}
    for spec in layer_spec(CONFIG):
        part = ".".join(spec.path.split(".")[:2]) if spec.path.startswith("blocks") else "rest"
        sizes[part] = sizes.get(part, 0) + 8 * spec.size
    rest = sizes.pop("rest")
    for found in pools[2].run(sharded.sent, CONFIG, PARAMS, "fsdp=2", BATCHES[0]):
        # A block's weights are gathered again where its activations are computed again.
        assert sorted(found["_allgather_base_"]) == sorted([rest, *2 * list(sizes.values())])
        assert sorted(found["_reduce_scatter_base_"]) == sorted([rest, *sizes.values()])


def test_a_team_adds_up_five_times_a_layer_and_twice_more(pools) -> None:
    tokens = PART_BATCHES[0].tokens
    width = 8 * tokens.size * PARTS.width
    keys = [8 * tokens.size * 2 * 8]  # the gradients of the single key and value
    for found in pools[2].run(sharded.sent, PARTS, params_of(PARTS), "tensor=2", PART_BATCHES[0]):
        assert not found.keys() & {"_allgather_base_", "_reduce_scatter_base_"}
        large = [size for size in found["allreduce_"] if size > 1000]
        # A post-norm of the MLP has its input added up again in the backward pass.
        again = sum(layer.post_norms for layer in PARTS.layers)
        assert sorted(large) == sorted(keys + [width] * (5 * PARTS.num_layers + again + 2))
        # `traffic` is for JAX, where a recurrent layer adds up once more, and no post-norm does.
        rows, length = tokens.shape
        said = traffic(PARTS, {"tensor": 2}, rows, length, "float32").collectives["all-reduce"]
        assert sum(large) == 2 * said + (again - 1) * width
        # The loss sends two numbers a token, never logits; the step sends its tokens and its norm.
        assert max(found["allgather_"]) == 2 * 8 * tokens.size


@pytest.mark.parametrize(
    ("heads", "kv_heads", "count", "expected"),
    [(4, 2, 2, [[0], [1]]), (4, 1, 2, [[0], [0]]), (8, 2, 4, [[0], [0], [1], [1]]),
     (6, 3, 2, [[0, 0, 1], [1, 2, 2]])],
)  # fmt: skip
def test_the_key_heads_of_a_process(heads, kv_heads, count, expected) -> None:
    mixer = Attention(heads, kv_heads, 8, None, Rope(), scale=1.0)
    assert [key_heads(mixer, index, count) for index in range(count)] == expected


def test_what_neighbours_send_does_not_grow_with_a_row(pools) -> None:
    config = dataclasses.replace(PARTS, layers=PARTS.layers[:2])  # without the reach that is all
    short, long = (
        pools[2].run(sharded.sent, config, params_of(config), "sequence=2", batch)
        for batch in (make_batch(config, 0, rows=4, length=length) for length in (16, 32))
    )
    assert short == long
    assert short[0]["send"]


def test_loss_fn_gives_the_global_mean_and_the_gradients_of_one_process(pools) -> None:
    model = sharded.model_of(CONFIG, PARAMS, None)
    loss, _ = loss_fn(model, BATCHES[0])
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    for value, gradients in pools[2].run(sharded.own_loop, CONFIG, PARAMS, BATCHES[0]):
        assert_close(value, float(loss.detach()), "output", "float64")
        assert_close(gradients, expected, "gradient", "float64")


@pytest.mark.parametrize("options", ["adamw", *sweep([], ["adafactor", "lora q8"])])
def test_a_saved_state_resumes_on_another_number_of_processes(pools, options, tmp_path) -> None:
    settings, folder = OPTIONS[options], tmp_path / "state"
    args = (folder, PARTS, params_of(PARTS))
    pools[2].run(sharded.save_after, *args, "tensor=2", settings, PART_BATCHES[:2])
    expected, loss = sharded.resume(*args, None, settings, PART_BATCHES[2])
    assert expected["step"] == 2
    for mesh in sweep(["fsdp=2", "tensor=2"], STRATEGIES):
        for arrays, found in pools[count_of(mesh)].run(
            sharded.resume, *args, mesh, settings, PART_BATCHES[2]
        ):
            assert list(arrays) == list(expected)
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, expected[name], err_msg=name)
            assert_close(found, loss, "output", "float64")


def test_mistakes_are_named_in_every_process(pools, tmp_path) -> None:
    pools[2].run(sharded.check_mistakes, CONFIG, PARAMS, BATCHES[0], tmp_path / "state")


@pytest.fixture
def run_options(tmp_path) -> list[str]:
    """A small run of `recurrentgemma train`, without its folder."""
    texts = [{"text": f"In the beginning there were {n} words, and then more."} for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    config = make_config("RA", vocab_size=2048, width=16, logits_soft_cap=30.0)
    (tmp_path / "config.json").write_text(config.to_json())
    text = f"""train --train {tmp_path / "data.jsonl"} --config {tmp_path / "config.json"}
      --validation-share 0.1 --length 16 --batch-size 3 --steps 4 --evaluate-every 2
      --checkpoint-every 2 --log-every 1 --sample-tokens 2 --no-plot --framework torch
      --optimizer sgd --learning-rate 0.1"""
    return text.split()


@pytest.mark.parametrize("mesh", sweep(["fsdp=2"], ["fsdp=2", "tensor=2", "sequence=2"]))
def test_the_command_trains_on_two_processes_and_resumes_on_one(
    pools, run_options, tmp_path, mesh
) -> None:
    out = tmp_path / "run"
    first, other = pools[2].run(sharded.command, *run_options, "--out", str(out), "--mesh", mesh)
    assert first[0] == other[0] == 0, first[2] + other[2]
    assert other[1:] == ("", "")
    assert "step 4/4: loss" in first[2]
    shutil.rmtree(out / "checkpoints" / "step-0000004")
    expected = load_checkpoint((out / "model").rename(tmp_path / "expected")).state_dict()
    code, _, said = sharded.command(*run_options, "--out", str(out), "--resume")
    assert code == 0, said
    assert "continuing from" in said
    found = load_checkpoint(out / "model").state_dict()
    for name, value in expected.items():
        assert_close(found[name].numpy(), value.numpy(), "state", "float32", name=name)


def test_processes_that_disagree_or_have_no_mesh_are_told(
    pools, run_options, tmp_path, monkeypatch
) -> None:
    args = (*run_options, "--out", str(tmp_path / "run"))
    results = pools[2].run(sharded.command_with_another_seed, *args, "--mesh", "fsdp=2")
    for code, _, said in results:
        assert code == 2
        assert "--seed is 0 in process 0 and 1 in process 1" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = sharded.command(*args)
    assert (code, "--mesh fsdp=2 splits the model" in said) == (2, True)
    assert not (tmp_path / "run").exists()


def test_sample_and_score_print_once(pools, tmp_path) -> None:
    mesh = "--mesh", "tensor=2", "--framework", "torch"
    (tmp_path / "text").write_text("In the beginning there were words, and then more.")
    score = "score", str(tmp_path / "text")
    for words in (("sample", "In the", "--max-new-tokens", "4"), score):
        code, expected, said = sharded.command(*words, *mesh[2:])
        assert code == 0, said
        first, other = pools[2].run(sharded.command, *words, *mesh)
        assert first[0] == 0, first[2]
        found, wanted = (re.split(r"(-?\d+\.\d+)", text) for text in (first[1], expected))
        assert found[::2] == wanted[::2]
        np.testing.assert_allclose([*map(float, found[1::2])], [*map(float, wanted[1::2])], 1e-4)
        assert other == (0, "", "")
    args = ("sample", "In the", *mesh, "--save-state", "state")
    for code, _, said in pools[2].run(sharded.command, *args):
        assert (code, "--save-state are for one process" in said) == (2, True)


@pytest.mark.parametrize("victim", sweep([0], [0, 1]))
def test_a_process_killed_in_a_save_loses_nothing(pools, victim, tmp_path) -> None:
    folder, options = tmp_path / "state", OPTIONS["adamw"]
    args = (folder, CONFIG, PARAMS)
    pools[2].run(sharded.save_after, *args, "fsdp=2", options, BATCHES[:1])
    errors = pools[2].run(sharded.die_in_a_save, *args, victim, deaths=1)
    assert errors[victim] is None
    assert "Error" in errors[1 - victim]
    arrays, _ = sharded.resume(*args, None, options, BATCHES[0])
    assert arrays["step"] == 1
    sharded.save_after(*args, None, options, BATCHES[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert sharded.resume(*args, None, options, BATCHES[0])[0]["step"] == 2


@pytest.fixture
def fake_mesh() -> Iterator[Any]:
    """Makes meshes of many processes, of which only the first is here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(**sizes: int):
        count = math.prod(sizes.values())
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("preset", [Preset.RECURRENT_GEMMA_2B_V1, *sweep([], ["GRIFFIN_PAPER_7B"])])
def test_every_process_keeps_its_share(fake_mesh, preset) -> None:
    config = GriffinConfig.from_preset(Preset(preset))
    meshes = [{"fsdp": count} for count in (2, 4, 6, 8)]
    for sizes in [*meshes, {"tensor": 2}, {"fsdp": 4, "tensor": 2}]:
        model = Griffin(config, device="meta", dtype=torch.bfloat16)
        shard(model, fake_mesh(**sizes))
        parts: Any = model.parameters()
        kept = sum(part.to_local().nbytes for part in parts)
        assert kept <= 1.02 * 2 * num_parameters(config) / math.prod(sizes.values()), sizes


def test_the_layout_of_a_state_is_printed(fake_mesh) -> None:
    model = Griffin(CONFIG, device="meta", dtype=torch.float32)
    shard(model, fake_mesh(fsdp=2))
    state = create_train_state(model.to_empty(device="cpu"), lora=LoraOptions(rank=2))
    lines = str(layout_of(state)).splitlines()
    assert lines[0].split() == ["array", "count", "shape", "split", "bytes"]
    assert all(len(line) <= 130 for line in lines)


def test_a_version_of_pytorch_that_does_not_split(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    mesh: Any = None
    with pytest.raises(RuntimeError, match=r"PyTorch 2\.10 or newer, got 2\.9\.1"):
        shard(Griffin(load_checkpoint().config, device="meta"), mesh)
