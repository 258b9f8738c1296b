"""The layout of a model over many devices."""

import math

import pytest
from cases import CONFIGS, make_config

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.sharding import (
    activation_layout,
    device_values,
    inherited,
    layout,
    mesh_text,
    parse_mesh,
    require_fit,
    share,
    state_layout,
    strategy,
)
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs

TWO_B = config_from_preset("RECURRENT_GEMMA_2B_V1")
EVEN = make_config("RRA", width=576, mlp_expanded_width=1152, num_heads=24, vocab_size=960)


@pytest.mark.parametrize(
    ("text", "devices", "mesh"),
    [
        ("fsdp=-1,tensor=4", 8, {"fsdp": 2, "tensor": 4}),
        ("tensor=4, fsdp=2", 8, {"fsdp": 2, "tensor": 4}),
        ("fsdp", 8, {"fsdp": 8}),
        ("data=2", 8, {"data": 2}),
        ("sequence=2,fsdp=-1", 6, {"fsdp": 3, "sequence": 2}),
    ],
)
def test_meshes(text: str, devices: int, mesh: dict[str, int]) -> None:
    parsed = parse_mesh(text, devices)
    assert parsed == mesh
    assert list(parsed) == list(mesh)
    assert parse_mesh(mesh_text(mesh), devices) == mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", r"axes data, fsdp, sequence, tensor, as in fsdp=4,tensor=2, got 'model=2'"),
        ("", "axes data"),
        ("fsdp=2,fsdp=4", "fsdp twice"),
        ("fsdp=0", "positive integer or -1, got '0'"),
        ("fsdp=two", "positive integer or -1, got 'two'"),
        ("fsdp=-1,tensor=-1", "only one axis .* got fsdp and tensor"),
        ("fsdp=-1,tensor=3", "got 3 and 8; sizes that do: 1, 2, 4 or 8"),
        ("fsdp=4,tensor=4", "needs 16 devices, there are 8"),
    ],
)
def test_bad_meshes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mesh(text, 8)


def test_layout_of_the_published_model() -> None:
    splits = layout(TWO_B, {"fsdp": 4, "tensor": 2}, LoraOptions(targets=("attention", "mlp")))
    block, attention = "blocks.0.recurrent_block", "blocks.2.attention_block"
    mlp = "blocks.0.mlp_block"
    assert splits["embedder.input_embedding"] == ("tensor", "fsdp")
    assert splits[f"{block}.linear_x.kernel"] == ("fsdp", "tensor")
    assert splits[f"{block}.linear_out.kernel"] == ("tensor", "fsdp")
    assert splits[f"{block}.conv_1d.w"] == (None, "tensor")
    assert splits[f"{block}.rg_lru.a_gate.w"] == ("tensor", "fsdp", None)
    assert splits[f"{attention}.proj_q.kernel"] == ("fsdp", "tensor")
    assert splits[f"{attention}.proj_k.kernel"] == ("fsdp", None)  # one key head
    assert splits[f"{mlp}.ffw_up.w"] == (None, "fsdp", "tensor")
    assert splits[f"{mlp}.ffw_up.b"] == (None, None, None, "tensor")
    assert splits[f"{mlp}.ffw_down.bias"] == ("fsdp",)
    assert splits[f"{mlp}.ffw_up.w.lora_a"] == (None, "fsdp", None)
    assert splits[f"{mlp}.ffw_up.w.lora_b"] == (None, None, "tensor")
    assert splits[f"{attention}.proj_final.kernel.lora_a"] == ("tensor", None)
    assert layout(TWO_B, {"fsdp": 4})["embedder.input_embedding"] == ("fsdp", None)
    assert set(layout(TWO_B, {"data": 4}).values()) == {(None,) * n for n in (1, 2, 3, 4)}
    many_keys = layout(config_from_preset("GEMMA3_4B"), {"tensor": 4})
    assert many_keys["blocks.0.attention_block.proj_k.kernel"] == (None, "tensor")


# 2 B as published, and a config that 6 divides.
MESHES = [
    (config, mesh)
    for config, meshes in (
        (TWO_B, "fsdp=2 fsdp=4 fsdp=8 sequence=8 tensor=2 fsdp=2,tensor=2 fsdp=4,tensor=2"),
        (EVEN, "fsdp=2 fsdp=4 fsdp=6 fsdp=8 sequence=6 fsdp=3,sequence=2 fsdp=3,tensor=2"),
    )
    for mesh in meshes.split()
]


@pytest.mark.parametrize(("config", "text"), MESHES)
def test_every_device_has_its_share(config: Config, text: str) -> None:
    mesh = parse_mesh(text, 8)
    total, devices = sum(spec.size for spec in layer_spec(config)), math.prod(mesh.values())
    assert total / devices <= device_values(config, mesh) <= 1.02 * total / devices


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_device_has_its_share_of_the_adapters(devices: int) -> None:
    lora, mesh = LoraOptions(), {"fsdp": devices}
    splits = layout(TWO_B, mesh, lora)
    specs = trainable_specs(TWO_B, lora)
    kept = sum(spec.size // share(splits[spec.path], mesh) for spec in specs)
    assert kept == sum(spec.size for spec in specs) // devices


def test_rules_come_first() -> None:
    mesh = {"fsdp": 2, "tensor": 2}
    splits = layout(TWO_B, mesh, rules=(("vocab", None), ("width", "fsdp"), ("mlp", "tensor")))
    assert splits["embedder.input_embedding"] == (None, "fsdp")
    assert splits["blocks.0.mlp_block.ffw_down.kernel"] == ("tensor", "fsdp")
    with pytest.raises(ValueError, match=r"rules map to the axes data, fsdp, .* got model"):
        layout(TWO_B, mesh, rules=(("vocab", "model"),))


def test_moments_are_split_like_their_parameters() -> None:
    split, shape = ("fsdp", "tensor"), (6, 4)
    assert inherited(split, (6, 4), shape) == split
    assert inherited(split, (6, 1), shape) == ("fsdp", None)
    assert inherited(split, (1, 4), shape) == (None, "tensor")


def test_activations_and_states() -> None:
    mesh = {"data": 2, "fsdp": 2, "tensor": 5}
    axes = activation_layout(mesh)
    assert axes["batch"] == ("data", "fsdp")
    assert axes["mlp"] == axes["heads"] == axes["vocab"] == ("tensor",)
    assert axes["time"] == ()
    states = state_layout(TWO_B, mesh, 4)
    assert states["blocks.0.rg_lru_state"] == (("data", "fsdp"), ("tensor",))
    assert states["blocks.2.keys"] == (("data", "fsdp"), (), (), ())
    assert state_layout(TWO_B, mesh, 3)["blocks.0.rg_lru_state"] == ((), ("tensor",))


def test_strategies() -> None:
    assert strategy({"fsdp": 1}) == "data"
    assert strategy({"fsdp": 4, "tensor": 2}) == "fsdp+tensor"
    with pytest.raises(ValueError, match=r"must be one of data, .* which is sequence\+tensor"):
        strategy({"sequence": 4, "tensor": 2})


@pytest.mark.parametrize(
    ("config", "mesh", "sizes", "message"),
    [
        (TWO_B, {"tensor": 4}, {}, r"tensor=4 must divide the number of .* 10; .* 1, 2, 5 or 10"),
        (TWO_B, {"fsdp": 6}, {}, r"fsdp=6 .* all but 2 % .* divide embedder.*; .* 4, 5, 8 or 10"),
        (CONFIGS["griffin"], {"tensor": 2}, {}, "divide vocab_size 31; sizes that fit: 1$"),
        (TWO_B, {"data": 4}, {"rows": 6}, r"divisible by data \* fsdp = 4, got 6"),
        (TWO_B, {"sequence": 4}, {"length": 6}, "divisible by sequence=4, got 6"),
    ],
)
def test_what_does_not_fit(config: Config, mesh: dict, sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_fit(config, mesh, **sizes)
