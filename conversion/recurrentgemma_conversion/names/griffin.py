"""Griffin and RecurrentGemma in the formats: Hugging Face's names, and configs of all formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType, member
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names.family import COUNTS_ITSELF, Family
from recurrentgemma_conversion.names.table import Rule
from recurrentgemma_conversion.overrides import Overrides

_KERNEL = "i o -> o i"  # torch.nn.Linear holds the transpose of a Flax kernel
_BLOCK, _LAYER = "blocks.*.", "model.layers.*."


def _alike(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """One tensor for each parameter: names below a module of ours and one of theirs."""
    return [
        Rule((ours + a,), (theirs + b,), _KERNEL if a.endswith("kernel") else "")
        for a, b in names.items()
    ]


def _halves(ours: str, theirs: str, axes: str) -> Rule:
    """The two halves of the gated MLP."""
    names = (f"{_LAYER}mlp_block.{half}_proj.{theirs}" for half in ("gate", "up"))
    return Rule((f"{_BLOCK}mlp_block.ffw_up.{ours}",), tuple(names), axes)


HUGGINGFACE = [
    *_alike("embedder.", "model.", {"input_embedding": "embed_tokens.weight"}),
    *_alike("final_norm.", "model.final_norm.", {"scale": "weight"}),
    *_alike(
        _BLOCK,
        _LAYER,
        {
            "temporal_pre_norm.scale": "temporal_pre_norm.weight",
            "channel_pre_norm.scale": "channel_pre_norm.weight",
            "mlp_block.ffw_down.kernel": "mlp_block.down_proj.weight",
            "mlp_block.ffw_down.bias": "mlp_block.down_proj.bias",
        },
    ),
    _halves("w", "weight", _KERNEL),
    _halves("b", "bias", "1 1 m -> m"),
    *_alike(
        f"{_BLOCK}recurrent_block.",
        f"{_LAYER}temporal_block.",
        {
            "linear_y.kernel": "linear_y.weight",
            "linear_y.bias": "linear_y.bias",
            "linear_x.kernel": "linear_x.weight",
            "linear_x.bias": "linear_x.bias",
            "linear_out.kernel": "linear_out.weight",
            "linear_out.bias": "linear_out.bias",
            "conv_1d.b": "conv_1d.bias",
            "rg_lru.a_param": "rg_lru.recurrent_param",
            "rg_lru.input_gate.w": "rg_lru.input_gate_weight",
            "rg_lru.input_gate.b": "rg_lru.input_gate_bias",
            "rg_lru.a_gate.w": "rg_lru.recurrent_gate_weight",
            "rg_lru.a_gate.b": "rg_lru.recurrent_gate_bias",
        },
    ),
    Rule(
        (f"{_BLOCK}recurrent_block.conv_1d.w",),
        (f"{_LAYER}temporal_block.conv_1d.weight",),
        "w l -> l 1 w",
    ),
    *_alike(
        f"{_BLOCK}attention_block.",
        f"{_LAYER}temporal_block.",
        {
            "proj_q.kernel": "q_proj.weight",
            "proj_k.kernel": "k_proj.weight",
            "proj_v.kernel": "v_proj.weight",
            "proj_final.kernel": "o_proj.weight",
            "proj_final.bias": "o_proj.bias",
        },
    ),
]

# The model has no other values; where a config does not say, these are transformers' defaults.
_FIXED = {
    "num_key_value_heads": 1,
    "conv1d_width": 4,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Configs since transformers 5 have the first of these; the second names the type differently.
_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_ROPE_TYPE = {"rope_type": "default", "type": "default"}


def resolve(
    tensors: Mapping[str, Tensor], stated: GriffinConfig | None, overrides: Overrides
) -> GriffinConfig:
    """The config of a checkpoint.

    Each field comes from the first of these that says it:

    1. the overrides, field by field;
    2. the preset among them, whose sizes must be the checkpoint's;
    3. the config that the checkpoint states;
    4. the shapes of its tensors;
    5. the one preset that has these shapes.

    Raises:
      ValueError: The preset contradicts the sizes (each is named), or a field remains unknown.
    """
    config = stated or _from_shapes(tensors, preset=overrides.preset, **overrides.fields)
    if overrides.preset is not None:
        name = member(Preset, overrides.preset).name
        preset = GriffinConfig.from_preset(name, config.vocab_size)
        conflicts = [
            f"{field} is {here} in the checkpoint and {there} in the preset"
            for field, (here, there) in config.differences(preset).items()
            if field not in Overrides._fields
        ]
        if conflicts:
            raise ValueError(f"this is not {name}: {'; '.join(conflicts)}")
        config = dataclasses.replace(preset, scan_type=config.scan_type)
    return dataclasses.replace(config, **overrides.fields)


def sized(tensors: Mapping[str, Tensor]) -> GriffinConfig:
    """A config with the parameters that tensors have. No parameter depends on the other fields."""
    return _from_shapes(
        tensors, embeddings_scale_by_sqrt_dim=True, attention_window_size=1, logits_soft_cap=0.0
    )


def _from_shapes(tensors: Mapping[str, Tensor], **given: Any) -> GriffinConfig:
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise ValueError(f"tensors must not be empty, got {', '.join(empty)}")
    return GriffinConfig.from_torch_params(tensors, **given)


def release(config: GriffinConfig) -> str:
    """What Kaggle calls the weights of a published size."""
    names = {Preset.RECURRENT_GEMMA_2B_V1: "2b", Preset.RECURRENT_GEMMA_9B_V1: "9b"}
    sizes = ("width", "lru_width", "block_types")
    for preset, name in names.items():
        if all(preset.config_dict[size] == getattr(config, size) for size in sizes):
            return name
    return "model"


def to_fields(config: GriffinConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which `transformers` computes the same: its window counts the query.

    The published ones have W there, so that `transformers` sees one key fewer.
    """
    fields: dict[str, Any] = {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "attention_dropout": 0.0,
        "attention_window_size": config.attention_window_size + 1,
        COUNTS_ITSELF: True,
        "block_types": _pattern([block.value for block in config.block_types]),
        "dtype": dtype,
        "embeddings_scale_by_sqrt_dim": config.embeddings_scale_by_sqrt_dim,
        "final_w_init_variance_scale": 2.0 / config.num_layers,
        "head_dim": config.head_dim,
        "hidden_size": config.width,
        "intermediate_size": 2 * config.mlp_expanded_width,
        "logits_soft_cap": config.logits_soft_cap,
        "lru_width": config.lru_width,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "rope_parameters": {"rope_type": "default", **_ROPE},
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "w_init_variance_scale": 0.01,
        **_FIXED,
        **_ROPE,  # here and `torch_dtype` for transformers 4, as published
    }
    if config.scan_type is not ScanType.AUTO:
        fields["scan_type"] = config.scan_type.value  # ours: no other program reads it
    return fields


def as_published(fields: dict[str, Any]) -> dict[str, Any]:
    """The same with W for a window."""
    kept = {name: value for name, value in fields.items() if name != COUNTS_ITSELF}
    return kept | {"attention_window_size": fields["attention_window_size"] - 1}


def fields_note(config: GriffinConfig) -> list[str]:
    """How the window differs from the published one, where a layer has one."""
    if TemporalBlockType.ATTENTION not in config.block_types:
        return []
    window = config.attention_window_size
    wider = f"attention_window_size is {window + 1} for transformers, which counts the query's own"
    return [f"{wider} key; as published it is {window}"]


def not_in_transformers(config: GriffinConfig) -> list[str]:
    """What `transformers` does not have."""
    problems = []
    if not config.embeddings_scale_by_sqrt_dim:
        problems.append("embeddings_scale_by_sqrt_dim must be True, got False")
    if not config.logits_soft_cap > 0:
        problems.append(f"logits_soft_cap must be above 0, got {config.logits_soft_cap}")
    return problems


def _pattern(blocks: list[str]) -> list[str]:
    """The shortest list that gives this one when it is repeated and cut off, as published."""
    lengths = range(1, len(blocks) + 1)
    return next(blocks[:n] for n in lengths if blocks[n:] == blocks[: len(blocks) - n])


def from_fields(path: Path, fields: Mapping[str, Any]) -> GriffinConfig:
    """Our config from Hugging Face's fields.

    Raises:
      ConfigError: They are incomplete, or ask for what the model does not have.
    """
    said, fixed = dict(fields), _FIXED | _ROPE
    problems = []
    for field in _ROPE_FIELDS:
        rope = fields.get(field) or {}
        if not isinstance(rope, dict):
            problems.append(f"{field} must be an object, got {rope!r}")
            continue
        said |= {f"{field}.{name}": value for name, value in rope.items()}
        fixed |= {f"{field}.{name}": value for name, value in (_ROPE | _ROPE_TYPE).items()}
    try:
        layers, pattern = fields["num_hidden_layers"], fields["block_types"]
        if not isinstance(pattern, list) or not pattern or type(layers) is not int:
            raise ValueError("block_types must be a list and num_hidden_layers a number")
        if not 0 < layers <= 10_000:
            raise ValueError(f"num_hidden_layers must be from 1 to 10000, got {layers}")
        if type(fields["intermediate_size"]) is not int or fields["intermediate_size"] % 2:
            raise ValueError(f"intermediate_size must be even, got {fields['intermediate_size']!r}")
        config = GriffinConfig(
            vocab_size=fields["vocab_size"],
            width=fields["hidden_size"],
            mlp_expanded_width=fields["intermediate_size"] // 2,
            num_heads=fields["num_attention_heads"],
            block_types=tuple((pattern * layers)[:layers]),
            embeddings_scale_by_sqrt_dim=fields.get("embeddings_scale_by_sqrt_dim", True),
            attention_window_size=fields["attention_window_size"] - bool(fields.get(COUNTS_ITSELF)),
            logits_soft_cap=fields["logits_soft_cap"],
            lru_width=fields.get("lru_width", fields["hidden_size"]),
            scan_type=fields.get("scan_type", ScanType.AUTO),
        )
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    fixed["head_dim"] = config.head_dim
    problems += [
        f"{name} must be {value!r}, got {said[name]!r}"
        for name, value in fixed.items()
        if said.get(name) is not None and said[name] != value
    ]
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config


GRIFFIN = Family(
    config=GriffinConfig,
    model_types=("recurrent_gemma",),
    tables={Format.HUGGINGFACE: lambda config: HUGGINGFACE},
    resolve=resolve,
    sized=sized,
    from_fields=from_fields,
    to_fields=to_fields,
    release=release,
    as_published=as_published,
    fields_note=fields_note,
    not_in_transformers=not_in_transformers,
    modules={"recurrent_block": "temporal_block", "attention_block": "temporal_block"},
)
