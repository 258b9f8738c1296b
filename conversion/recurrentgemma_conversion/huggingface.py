"""`huggingface`: folders for `transformers`' RecurrentGemmaForCausalLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.errors import ConfigError, MismatchError, NotRecurrentGemmaError
from recurrentgemma.common.io.arrays import Stacked, same_bits
from recurrentgemma.common.io.shards import Shards, ShardsWriter
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import ParamSpec, layer_spec
from recurrentgemma.common.model.layouts import Stored
from recurrentgemma.common.model.presets import ScanType
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import (
    Format,
    Reader,
    Request,
    Tensor,
    Writer,
    require_recurrent,
    stored_tensors,
)
from recurrentgemma_conversion.huggingface_tokenizer import write_tokenizer_files
from recurrentgemma_conversion.overrides import Overrides, resolve_config

CONFIG = "config.json"
MODEL_TYPE = "recurrent_gemma"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What the model has no other value of; transformers' default where a config does not say.
_FIXED = {
    "num_key_value_heads": 1,
    "conv1d_width": 4,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Where configs say it: in the first since transformers 5, with the type's older name in the second.
_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_ROPE_TYPE = {"rope_type": "default", "type": "default"}
# As in the published vocabulary.
SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
GENERATION = "generation_config.json"
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)


def hf_layout(spec: ParamSpec) -> tuple[Stored, ...]:
    """A parameter as Hugging Face has it."""
    return spec.hf


class HuggingFaceReader(Reader):
    """A folder of `config.json` and safetensors, or one of these; its tensors are views of them."""

    format = Format.HUGGINGFACE
    layout = staticmethod(hf_layout)

    def __init__(self, path: Path, overrides: Overrides) -> None:
        """Opens it.

        Raises:
          CheckpointError: It is damaged, of another model, or not what its config says.
        """
        folder = path if path.is_dir() else path.parent
        fields = read_fields(folder / CONFIG)
        self.shards = Shards(path)
        tensors = {n: Tensor(t.shape, t.dtype) for n, t in self.shards.tensors.items()}
        require_recurrent(path, list(tensors))
        config = resolve_config(path, tensors, from_fields(folder / CONFIG, fields), overrides)
        self._head = tensors.pop(_HEAD, None)  # some tools store the tied output matrix, too
        super().__init__(path, config, tensors, [folder])
        self.special_ids = {name: fields[name] for name in SPECIAL if name in fields}
        self.companions = [folder / name for name in _COMPANIONS if (folder / name).is_file()]
        if self._head not in (None, tensors[_EMBEDDING]):
            raise self._untied()

    def fetch(self, name: str) -> np.ndarray:
        tensor = self.shards.read(name)
        if name == _EMBEDDING and self._head and not same_bits(tensor, self.shards.read(_HEAD)):
            raise self._untied()
        return tensor

    def _untied(self) -> MismatchError:
        shape = self.shards.tensors[_HEAD].shape
        return MismatchError(
            f"{self.path}: the tensors are not those of the config",
            [f"unexpected {_HEAD} {shape}: it must be the embedding, to which it is tied"],
        )

    @property
    def weights(self) -> Sequence[Path]:
        return self.shards.paths


class HuggingFaceWriter(Writer):
    """Writes what `from_pretrained` needs."""

    def __init__(self, folder: Path, request: Request) -> None:
        super().__init__(folder, request)
        layout = [(spec, spec.hf) for spec in layer_spec(request.config)]
        tensors = stored_tensors(request, layout)
        self._shards = ShardsWriter(folder, tensors, {"format": "pt"}, request.shard_size)

    def write(self, spec: ParamSpec, parameter: np.ndarray | Stacked) -> None:
        for part in spec.hf:
            self._shards.write(part.name, part.encode(parameter))

    def abandon(self) -> None:
        self._shards.abandon()

    def finish(self) -> None:
        dtype = self.request.dtypes["embedder.input_embedding"].name
        tokenizer = self.request.tokenizer
        given = dict(self.request.special_ids)
        ids: dict[str, Any] = SPECIAL if tokenizer is None else special_ids(tokenizer)
        ends: dict[str, Any] = {}
        if tokenizer is not None and tokenizer.end_of_turn_id is not None:
            ends["eos_token_id"] = [tokenizer.eos_id, tokenizer.end_of_turn_id]
        _write_json(self.folder / CONFIG, to_fields(self.request.config, dtype) | ids | given)
        _write_json(self.folder / GENERATION, ids | ends | given)
        if tokenizer is not None:
            write_tokenizer_files(self.folder, tokenizer)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens, by the names that configs have for them."""
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    return dict(zip(SPECIAL, ids, strict=True))


def to_fields(config: GriffinConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `transformers` reads. The window is W, as in the published ones."""
    fields: dict[str, Any] = {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "attention_window_size": config.attention_window_size,
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


def _pattern(blocks: list[str]) -> list[str]:
    """The shortest list that repeats to this one, the last time in part, as published."""
    lengths = range(1, len(blocks) + 1)
    return next(blocks[:n] for n in lengths if blocks[n:] == blocks[: len(blocks) - n])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a `config.json`."""
    if not path.is_file():
        raise ConfigError(f"the checkpoint folder {path.parent} lacks {path.name}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must be a JSON object, got {type(fields).__name__}")
    return fields


def from_fields(path: Path, fields: Mapping[str, Any]) -> GriffinConfig:
    """Our config from Hugging Face's fields.

    Raises:
      NotRecurrentGemmaError: They are another model's.
      ConfigError: They are incomplete, or ask for what the model does not have.
    """
    model_type = fields.get("model_type")
    if model_type != MODEL_TYPE:
        raise NotRecurrentGemmaError(
            f"{path}: model_type must be {MODEL_TYPE!r}, got {model_type!r}"
        )
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
            attention_window_size=fields["attention_window_size"],
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
