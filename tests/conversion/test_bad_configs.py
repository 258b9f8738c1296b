"""Configs that conflict, lack something, or ask for what is not computed."""

import json

import pytest
from checkpoints import CONFIGS

from recurrentgemma.common import errors
from recurrentgemma.common.model.presets import Preset
from recurrentgemma_conversion import Format, Overrides, open_checkpoint

pytest.importorskip("torch.nn", reason="torch is not installed")


CONFIG = CONFIGS["griffin"]


def test_configs_that_conflict(make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    (source / "config.json").unlink()
    refused(
        source,
        errors.ConfigError,
        "this is not RECURRENT_GEMMA_2B_V1: width is 24 in the checkpoint and 2560 in the preset",
        "num_heads is 2 in the checkpoint and 10",
        "block_types is RRARR in the checkpoint and RRARRARRARRARRARRARRARRARR in the preset",
        overrides=Overrides(preset=Preset.RECURRENT_GEMMA_2B_V1),
    )
    named = Overrides(preset="HAWK_PAPER_7B")  # pyright: ignore[reportArgumentType]
    refused(source, errors.ConfigError, "this is not HAWK_PAPER_7B", overrides=named)
    refused(source, errors.ConfigError, "not tell embeddings_scale_by_sqrt_dim, attention")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_key_value_heads", 2, "num_key_value_heads must be 1, got 2"),
        ("hidden_activation", "silu", "hidden_activation must be 'gelu_pytorch_tanh'"),
        ("rope_parameters", {"rope_theta": 1e6}, "rope_theta must be 10000.0, got 1000000.0"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 8.0},
            "rope_parameters.rope_type must be 'default', got 'linear'",
        ),
        (
            "rope_scaling",
            {"type": "dynamic", "factor": 2.0},
            "rope_scaling.type must be 'default', got 'dynamic'",
        ),
        ("rope_scaling", [8.0], "rope_scaling must be an object, got [8.0]"),
        ("head_dim", 7, "head_dim must be 12, got 7"),
        ("hidden_size", 10**320, "width must be below 2**63, got 1000"),
        ("intermediate_size", 10**320, "mlp_expanded_width must be below 2**63, got 5000"),
        ("logits_soft_cap", 10**400, "logits_soft_cap must be finite and at least 0, got 1000"),
        ("intermediate_size", 33, "intermediate_size must be even"),
        ("lru_width", 0, "lru_width must be a positive integer, got 0"),
        ("block_types", ["recurrent", "mamba"], "'mamba' is no TemporalBlockType"),
        ("vocab_size", None, "vocab_size must be a positive integer, got None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_of_huggingface_that_ask_for_something_else(
    make, refused, field: str, value, words: str
) -> None:
    source = make("source", Format.HUGGINGFACE)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {field: value}))
    refused(source, errors.ConfigError, words)


@pytest.mark.parametrize("field", ["intermediate_size", "block_types", "vocab_size"])
def test_configs_of_huggingface_that_lack_something(make, refused, field: str) -> None:
    source = make("source", Format.HUGGINGFACE)
    fields = json.loads((source / "config.json").read_text())
    del fields[field]
    (source / "config.json").write_text(json.dumps(fields))
    refused(source, errors.ConfigError, f"lacks '{field}'")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "head_dim": None},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000}},
    ],
    ids=str,
)
def test_configs_of_huggingface_that_ask_for_the_same_otherwise(make, changes: dict) -> None:
    source = make("source", Format.HUGGINGFACE)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | changes))
    with open_checkpoint(source) as reader:
        assert reader.config == CONFIG


@pytest.mark.parametrize(
    ("field", "value"),
    [("logits_soft_cap", 10**400), ("width", 10**320), ("mlp_expanded_width", 10**320)],
    ids=lambda value: str(value)[:40],
)
def test_numbers_without_end_in_our_configs(make, refused, field: str, value: int) -> None:
    source = make("source", Format.RECURRENTGEMMA)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {field: value}))
    refused(source, errors.ConfigError, f"{field} must be ")
