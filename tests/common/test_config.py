"""GriffinConfig: validation, presets, JSON, and what is read from the shapes of a checkpoint."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from cases import GRIFFINS

from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType
from recurrentgemma.common.model.state_dict import torch_name, torch_shape

R, A = TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION
FIELDS: dict[str, Any] = {
    "vocab_size": 31,
    "width": 24,
    "mlp_expanded_width": 32,
    "num_heads": 2,
    "block_types": (R, R, A),
    "embeddings_scale_by_sqrt_dim": True,
    "attention_window_size": 8,
    "logits_soft_cap": 30.0,
    "lru_width": 36,
    "scan_type": ScanType.AUTO,
}
NOT_IN_SHAPES = ("embeddings_scale_by_sqrt_dim", "attention_window_size", "logits_soft_cap")


def make(**changes: Any) -> GriffinConfig:
    return GriffinConfig(**FIELDS | changes)


# ------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"width": -24}, "width must be a positive integer, got -24"),
        ({"width": 24.0}, r"width must be a positive integer, got 24\.0"),
        ({"width": "24"}, "width must be a positive integer, got '24'"),
        ({"mlp_expanded_width": None}, "mlp_expanded_width must be a positive integer, got None"),
        ({"num_heads": True}, "num_heads must be a positive integer, got True"),
        ({"lru_width": 0}, "lru_width must be a positive integer, got 0"),
        ({"width": 10**320}, r"width must be below 2\*\*63, got 1000"),
        ({"attention_window_size": 2**63}, r"attention_window_size must be below 2\*\*63"),
        ({"attention_window_size": 0}, "attention_window_size must be a positive integer, got 0"),
        (
            {"width": 26, "num_heads": 3},
            "width must be divisible by num_heads, got width=26 num_he",
        ),
        (
            {"lru_width": 35},
            "lru_width must be divisible by num_heads, got lru_width=35 num_heads=2",
        ),
        ({"width": 20}, r"divisible by 4 .*, got 10 from width=20 num_heads=2"),
        ({"block_types": "recurrent"}, "block_types must be a sequence, got 'recurrent'"),
        ({"block_types": (R, "global")}, "'global' is no TemporalBlockType; choose from ATTENTION"),
        ({"block_types": (R, None)}, "None is no TemporalBlockType"),
        ({"block_types": 3}, "block_types must be a sequence, got 3"),
        ({"block_types": None}, "block_types must be a sequence, got None"),
        ({"scan_type": "quick"}, "'quick' is no ScanType; choose from AUTO, LINEAR_NATIVE"),
        ({"embeddings_scale_by_sqrt_dim": None}, "must be True or False, got None"),
        ({"embeddings_scale_by_sqrt_dim": 1}, "must be True or False, got 1"),
        ({"logits_soft_cap": -1.0}, r"logits_soft_cap must be finite and at least 0, got -1\.0"),
        ({"logits_soft_cap": None}, "logits_soft_cap must be finite and at least 0, got None"),
        ({"logits_soft_cap": float("nan")}, "at least 0, got nan"),
        ({"logits_soft_cap": float("inf")}, "at least 0, got inf"),
        ({"logits_soft_cap": 10**400}, "must be finite and at least 0, got 1000"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:60],
)
def test_bad_values(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_model_without_attention_may_have_heads_of_any_width() -> None:
    assert make(width=20, block_types=(R, R)).head_dim == 10


def test_values_are_normalised() -> None:
    config = make(block_types=["recurrent", "ATTENTION"], scan_type="auto", logits_soft_cap=0)
    assert config.block_types == (R, A)
    assert config.scan_type is ScanType.AUTO
    assert isinstance(config.logits_soft_cap, float)
    assert make(lru_width=None).lru_width == FIELDS["width"]
    without = {name: value for name, value in FIELDS.items() if name != "lru_width"}
    assert GriffinConfig(**without) == make(lru_width=None)


def test_frozen_and_hashable() -> None:
    config, same = make(), make(block_types=["recurrent", "recurrent", "attention"])
    assert config == same
    assert hash(config) == hash(same)
    assert config != make(width=48)
    assert {config: 1}[same] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 48  # pyright: ignore[reportAttributeAccessIssue]


def test_properties() -> None:
    config = make()
    assert (config.num_layers, config.head_dim, config.max_cache_length) == (3, 12, 8)
    assert config.embedding_scale == 4.90625  # sqrt(24) = 4.898979 in 8 significant bits
    assert make(embeddings_scale_by_sqrt_dim=False).embedding_scale == 1.0


@pytest.mark.parametrize(("width", "scale"), [(2560, 50.5), (4096, 64.0), (40, 6.3125)])
def test_embedding_scale(width: int, scale: float) -> None:
    assert make(width=width, num_heads=2).embedding_scale == scale


# ------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    "config",
    [make(), make(logits_soft_cap=0.0, embeddings_scale_by_sqrt_dim=False, scan_type="auto")]
    + [GriffinConfig.from_preset(preset) for preset in GRIFFINS],
)
def test_json_round_trip(config: GriffinConfig) -> None:
    text = config.to_json()
    assert GriffinConfig.from_json(text) == config
    fields = json.loads(text)
    assert set(fields) == {field.name for field in dataclasses.fields(GriffinConfig)}
    assert fields["block_types"][0] == "recurrent"
    assert GriffinConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a configuration is a JSON object, got list"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GriffinConfig.from_json(text)


def test_every_unknown_and_missing_field_is_named() -> None:
    fields = make().to_dict()
    del fields["width"], fields["num_heads"], fields["lru_width"], fields["scan_type"]
    fields |= {"depth": 3, "heads": 2}
    with pytest.raises(ValueError, match="not a Griffin configuration") as caught:
        GriffinConfig.from_dict(fields)
    message = str(caught.value)
    for name in ("unknown field 'depth'", "unknown field 'heads'"):
        assert name in message
    for name in ("missing field 'width'", "missing field 'num_heads'"):
        assert name in message
    assert "lru_width" not in message
    assert "scan_type" not in message


# --------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "width", "mlp", "heads", "lru", "layers", "window", "scale", "cap"),
    [
        ("RECURRENT_GEMMA_2B_V1", 2560, 7680, 10, 2560, 26, 2048, True, 30.0),
        ("RECURRENT_GEMMA_9B_V1", 4096, 12288, 16, 4096, 38, 2048, True, 30.0),
        ("GRIFFIN_PAPER_7B", 4096, 12288, 32, 5632, 32, 1024, False, 0.0),
        ("HAWK_PAPER_7B", 4096, 12288, 32, 5632, 32, 1024, False, 0.0),
    ],
)
def test_presets(preset, width, mlp, heads, lru, layers, window, scale, cap) -> None:
    config = GriffinConfig.from_preset(Preset[preset])
    assert config == GriffinConfig.from_preset(preset)
    pattern = (R, R, R) if preset.startswith("HAWK") else (R, R, A)
    assert config == GriffinConfig(
        vocab_size=256_000,
        width=width,
        mlp_expanded_width=mlp,
        num_heads=heads,
        lru_width=lru,
        block_types=tuple(pattern[i % 3] for i in range(layers)),
        attention_window_size=window,
        embeddings_scale_by_sqrt_dim=scale,
        logits_soft_cap=cap,
    )
    short = GriffinConfig.from_preset(preset, vocab_size=100, max_sequence_length=512)
    assert (short.vocab_size, short.attention_window_size) == (100, 512)
    long = GriffinConfig.from_preset(preset, max_sequence_length=1_000_000)
    assert long == config


def test_an_unknown_preset() -> None:
    with pytest.raises(
        ValueError, match="'GEMMA' is no Preset; choose from GRIFFIN_PAPER_7B, HAWK"
    ):
        GriffinConfig.from_preset("GEMMA")
    with pytest.raises(ValueError, match="max_sequence_length must be a positive integer, got 0"):
        GriffinConfig.from_preset("HAWK_PAPER_7B", max_sequence_length=0)


# ------------------------------------------------------------------------------------ from shapes


def shaped(shape: Iterable[int]) -> np.ndarray:
    """An array of a shape, without memory."""
    return np.broadcast_to(np.float32(0), tuple(shape))


def flax_tree(config: GriffinConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for spec in layer_spec(config):
        keys = spec.path.split(".")
        keys = [".".join(keys[:2]), *keys[2:]] if keys[0] == "blocks" else keys
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = shaped(spec.shape)
    return tree


def torch_state(config: GriffinConfig) -> dict[str, Any]:
    return {
        torch_name(spec.path): shaped(torch_shape(spec.path, spec.shape))
        for spec in layer_spec(config)
    }


def readings(config: GriffinConfig, **kwargs: Any) -> list[GriffinConfig]:
    """From Flax parameters, from variables, and from a state dict."""
    tree = flax_tree(config)
    return [
        GriffinConfig.from_flax_params_or_variables(tree, **kwargs),
        GriffinConfig.from_flax_params_or_variables({"params": tree}, **kwargs),
        GriffinConfig.from_torch_params(torch_state(config), **kwargs),
    ]


@pytest.mark.parametrize(
    "config",
    [
        make(),
        make(block_types=(R, A)),
        make(block_types=(A, R)),
        make(block_types=(R, R)),
        make(block_types=(A, A), lru_width=24),
        make(block_types=(A,), width=64, num_heads=16, lru_width=64),
        make(width=48, num_heads=4, block_types=(R, A, A), logits_soft_cap=0.0),
        make(num_heads=1),
    ],
    ids=lambda config: "".join(b.name[0] for b in config.block_types) + str(config.num_heads),
)
def test_from_shapes(config: GriffinConfig) -> None:
    rest = {name: getattr(config, name) for name in NOT_IN_SHAPES}
    for found in readings(config, **rest):
        assert found == config


@pytest.mark.parametrize("preset", GRIFFINS)
def test_presets_from_shapes(preset: Preset) -> None:
    """Recognised by their shapes where only one has these; or told, in whatever vocabulary."""
    config = GriffinConfig.from_preset(preset, vocab_size=1000)
    for found in readings(config) + readings(config, preset=preset):
        assert found == config
    for found in readings(config, preset=preset, max_sequence_length=100):
        assert found.attention_window_size == 100
    for found in readings(config, preset=preset, logits_soft_cap=7.0, attention_window_size=9):
        assert (found.logits_soft_cap, found.attention_window_size) == (7.0, 9)


@pytest.mark.parametrize("layers", [3, 6, 9])
def test_attention_last_has_the_right_heads(layers: int) -> None:
    """The first blocks of RecurrentGemma 2B, up to one of attention: ten heads, not one."""
    full = GriffinConfig.from_preset("RECURRENT_GEMMA_2B_V1")
    config = dataclasses.replace(full, block_types=full.block_types[:layers])
    assert config.block_types[-1] is A
    for found in readings(config, preset="RECURRENT_GEMMA_2B_V1"):
        assert found.num_heads == 10
        assert found == config


def test_what_shapes_do_not_tell_must_be_given() -> None:
    for reading in (
        lambda **kwargs: GriffinConfig.from_flax_params_or_variables(flax_tree(make()), **kwargs),
        lambda **kwargs: GriffinConfig.from_torch_params(torch_state(make()), **kwargs),
    ):
        with pytest.raises(ValueError, match="have the shapes of no preset") as caught:
            reading(logits_soft_cap=0.0)
        assert "embeddings_scale_by_sqrt_dim, attention_window_size" in str(caught.value)
        assert "logits_soft_cap" not in str(caught.value)
        with pytest.raises(ValueError, match="'GEMMA' is no Preset"):
            reading(preset="GEMMA")


def test_other_trees_are_refused() -> None:
    rest = {name: FIELDS[name] for name in NOT_IN_SHAPES}
    with pytest.raises(ValueError, match=r"not the parameters of a Griffin model: no 'embedder\."):
        GriffinConfig.from_torch_params({"layer.weight": shaped((3, 3))}, **rest)
    with pytest.raises(ValueError, match="not the parameters of a Griffin model"):
        GriffinConfig.from_flax_params_or_variables({}, **rest)
    state = torch_state(make())
    state["embedder.input_embedding"] = shaped((31,))
    with pytest.raises(ValueError, match=r"'embedder.input_embedding' must have 2 axes, got .*31,"):
        GriffinConfig.from_torch_params(state, **rest)
