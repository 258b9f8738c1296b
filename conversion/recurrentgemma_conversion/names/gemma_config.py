"""Gemma 1, 2 and 3 in the formats: their configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import ConfigError, UserError
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.presets import AttentionType, Preset, member
from recurrentgemma_conversion.formats import Tensor
from recurrentgemma_conversion.overrides import Overrides

VERSIONS = {"gemma": 1, "gemma2": 2, "gemma3_text": 3, "gemma3": 3}
# Where a config does not say: the defaults of transformers.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_CAPS = {1: (0.0, 0.0), 2: (50.0, 30.0), 3: (0.0, 0.0)}  # of scores and of logits
# The models have no other values.
_FIXED = {
    "attention_bias": (False,),
    "rms_norm_eps": (1e-6,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False,),
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # old configs of Gemma 1 call the tanh form so
    "hidden_activation": ("gelu_pytorch_tanh",),
}


def from_fields(path: Path, fields: Mapping[str, Any]) -> GemmaConfig:
    """Our config from Hugging Face's fields.

    Raises:
      ConfigError: They are incomplete, or ask for what the model does not have.
    """
    kind = fields["model_type"]
    fields = fields.get("text_config", fields)
    problems = [
        f"{name} must be {allowed[0]!r}, got {fields[name]!r}"
        for name, allowed in _FIXED.items()
        if fields.get(name) is not None and fields[name] not in allowed
    ]
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}")
    try:
        return _from_fields(VERSIONS[kind], fields)
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _from_fields(version: int, fields: Mapping[str, Any]) -> GemmaConfig:
    layers = fields["num_hidden_layers"]
    if type(layers) is not int or not 0 < layers <= 10_000:
        raise UserError(f"num_hidden_layers must be from 1 to 10000, got {layers!r}")
    said = _DEFAULTS | {name: value for name, value in fields.items() if value is not None}
    caps = [
        fields.get(name, default) or 0.0
        for name, default in zip(
            ("attn_logit_softcapping", "final_logit_softcapping"), _CAPS[version], strict=True
        )
    ]
    full, stretch = _rope(version, fields)
    return GemmaConfig(
        version=version,
        vocab_size=said.get("vocab_size", 262_208 if version == 3 else 256_000),
        width=fields["hidden_size"],
        mlp_width=fields["intermediate_size"],
        num_heads=said["num_attention_heads"],
        num_kv_heads=said["num_key_value_heads"],
        head_dim=said["head_dim"],
        layer_types=_layer_types(version, layers, said),
        sliding_window=None if version == 1 else said["sliding_window"],
        query_pre_attn_scalar=said["head_dim" if version == 1 else "query_pre_attn_scalar"],
        rope_base=full,
        rope_stretch=stretch,
        attention_soft_cap=caps[0],
        logits_soft_cap=caps[1],
    )


def _layer_types(version: int, layers: int, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    if version == 1:
        return (AttentionType.FULL,) * layers
    if "layer_types" in fields:
        if len(fields["layer_types"]) != layers:
            raise UserError(
                f"layer_types must have {layers} entries, got {len(fields['layer_types'])}"
            )
        return tuple(fields["layer_types"])
    known = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    every = 2 if version == 2 else known
    return tuple(
        AttentionType.SLIDING if (i + 1) % every else AttentionType.FULL for i in range(layers)
    )


def _rope(version: int, fields: Mapping[str, Any]) -> tuple[float, float]:
    """The base and the stretch of full layers, from a config of today or an older one."""
    theta = 1e6 if version == 3 else 10_000.0
    rope = fields.get("rope_parameters")
    if rope is None:
        full = {"rope_theta": fields.get("rope_theta", theta), **(fields.get("rope_scaling") or {})}
        sliding = {"rope_theta": fields.get("rope_local_base_freq", 10_000.0)}
    else:
        full = rope.get(AttentionType.FULL.value, rope)
        sliding = rope.get(AttentionType.SLIDING.value, {})
    kind = full.get("rope_type", full.get("type", "default"))
    base = float(full.get("rope_theta", theta))
    if kind not in ("default", "linear") or (version < 3 and kind == "linear"):
        raise UserError(f"rope_type must be 'default', or 'linear' in Gemma 3, got {kind!r}")
    local = sliding.get("rope_theta", 10_000.0)
    if local != 10_000 or sliding.get("rope_type", "default") != "default":
        raise UserError(f"the rope of sliding layers must have rope_theta 10000, got {sliding}")
    if version == 2 and base != 10_000:
        raise UserError(f"rope_theta must be 10000, got {base}")
    return base, float(full.get("factor") or 1.0) if kind == "linear" else 1.0


def to_fields(config: GemmaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `transformers` reads, of versions 4 and 5."""
    kind = {1: "gemma", 2: "gemma2", 3: "gemma3_text"}[config.version]
    name = {1: "Gemma", 2: "Gemma2", 3: "Gemma3"}[config.version]
    scalar = config.query_pre_attn_scalar
    fields: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act" if config.version == 1 else "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": 8192 if config.version < 3 else 32_768,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.version == 1:
        _require_plain(config)
        return fields | {"rope_parameters": rope}
    fields |= {
        "attn_logit_softcapping": config.attention_soft_cap or None,
        "final_logit_softcapping": config.logits_soft_cap or None,
        "layer_types": [layer.value for layer in config.layer_types],
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "sliding_window": config.sliding_window,
    }
    if config.version == 2:
        if (config.rope_base, config.rope_stretch) != (10_000, 1):
            raise ConfigError("transformers has no Gemma 2 of another rope than the published one")
        return fields | {"rope_parameters": rope}
    if config.rope_stretch != 1:
        fields["max_position_embeddings"] = 131_072
        fields["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_stretch}
        rope |= fields["rope_scaling"]
    sliding = {"rope_type": "default", "rope_theta": 10_000.0}
    return fields | {
        "rope_local_base_freq": 10_000.0,
        "rope_parameters": {"full_attention": rope, "sliding_attention": sliding},
    }


def _require_plain(config: GemmaConfig) -> None:
    """Raises `ConfigError` for a Gemma 1 with what only later ones can state."""
    plain = config.overridden(logits_soft_cap=0.0)
    scalar, kinds = float(config.head_dim), set(config.layer_types)
    if plain.attention_soft_cap or config.logits_soft_cap or config.rope_stretch != 1 or (
        config.query_pre_attn_scalar != scalar or kinds != {AttentionType.FULL}
    ):  # fmt: skip
        raise ConfigError("transformers has no Gemma 1 with soft caps, windows or other scales")


def sized(tensors: Mapping[str, Tensor]) -> GemmaConfig:
    """A config with the parameters that tensors have, named as in Flax or `gemma_pytorch`.

    What no shape tells follows the rules of the published models. Fused projections tell the sizes
    of all heads together; then the keys are one head, unless a norm says the width of a head.
    """
    problems = []
    numbers = [re.search(r"layers?[_.](\d{1,4})[./]", name) for name in tensors]
    layers = max((int(number[1]) + 1 for number in numbers if number), default=1)

    def shape(rank: int, *endings: str) -> tuple[int, ...]:
        """The shape of the tensor whose name ends so; a slash may be a dot."""
        for name, tensor in tensors.items():
            if any(re.search(re.escape(end).replace("/", "[./]") + "$", name) for end in endings):
                if len(tensor.shape) == rank and 0 not in tensor.shape:
                    return tensor.shape
                problems.append(f"{name!r} must have {rank} axes, got shape {tensor.shape}")
                return (1,) * rank
        problems.append(f"no {endings[0]}")
        return (1,) * rank

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in tensors)

    version = 3 if has("query_norm") else 2 if has("post_ffw|pre_feedforward") else 1
    vocab_size, width = shape(2, "embedder.input_embedding", "embedder.weight")
    if has(r"qkv_proj\.weight"):
        query = shape(2, "layers.0.self_attn.o_proj.weight")[1]
        both = shape(2, "layers.0.self_attn.qkv_proj.weight")[0]
        key = max((both - query) // 2, 1)
        norm = shape(1, "layers.0.self_attn.query_norm.weight")[0] if version == 3 else key
        heads, kv_heads, head_dim = query // norm, key // norm, norm
        mlp_width = shape(2, "layers.0.mlp.down_proj.weight")[1]
    else:
        heads, head_dim, _ = shape(3, "layer_0/attn/attn_vec_einsum.w")
        together = has(r"qkv_einsum")
        kv_heads = heads if together else shape(4, "layer_0/attn/kv_einsum.w")[1]
        mlp_width = shape(2, "layer_0/mlp/linear.w", "layer_0/mlp/linear")[0]
    if problems:
        raise UserError(f"these are not the parameters of a Gemma: {', '.join(problems)}")
    return GemmaConfig.from_sizes(
        version, vocab_size, width, mlp_width, layers, heads, kv_heads, head_dim
    )


def resolve(
    tensors: Mapping[str, Tensor], stated: GemmaConfig | None, overrides: Overrides
) -> GemmaConfig:
    """The config of a checkpoint: the preset's that is asked for, or stated, or of these shapes.

    Raises:
      ValueError: The preset has other shapes, or no published model has those of the tensors.
    """
    held = stated or sized(tensors)

    def alike(preset: Preset) -> bool:
        config = config_from_preset(preset, held.vocab_size)
        return isinstance(config, GemmaConfig) and config.version == held.version and (
            {spec.path: spec.shape for spec in layer_spec(config)}
            == {spec.path: spec.shape for spec in layer_spec(held)}
        )  # fmt: skip

    if overrides.preset is not None:
        known = member(Preset, overrides.preset)
        if not alike(known):
            raise UserError(f"this is not {known.name}: its parameters have other shapes")
    elif stated is not None:
        return stated.overridden(**overrides.fields)
    else:
        known = next(filter(alike, Preset), None)
        if known is None:
            raise UserError(
                "these parameters have the shapes of no published Gemma, and shapes do not tell "
                "windows, scales and ropes: put a config.json of ours beside them"
            )
    config = config_from_preset(known, held.vocab_size)
    return GemmaConfig.from_dict(config.to_dict()).overridden(**overrides.fields)


def release(config: GemmaConfig) -> str:
    """What Kaggle calls the weights of a published size."""
    sizes = ("version", "width", "num_heads", "layer_types")
    for preset in Preset:
        known = preset.config_dict
        if all(known.get(size) == getattr(config, size) for size in sizes):
            return preset.name.lower().replace("_", "-")
    return "model"
