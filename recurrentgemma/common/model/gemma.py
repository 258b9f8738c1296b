"""The configuration of Gemma 1, 2 and 3: `GemmaConfig`, a short way to write a `ModelConfig`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import (
    Config,
    Layer,
    ModelConfig,
    checked_cap,
    checked_fields,
    register_config,
)
from recurrentgemma.common.model.mixers import Attention, Rope, check_divisible, check_positive
from recurrentgemma.common.model.presets import AttentionType, gemma_fields, member

VERSIONS = (1, 2, 3)


@dataclasses.dataclass(frozen=True, repr=False)
class GemmaConfig(Config):
    """Everything that defines a Gemma: a stack of attention layers without biases.

    Embeddings are multiplied by sqrt(D), rounded to the dtype of the table.

    Attributes:
      version: 1, 2 or 3. From 2 on the outputs of attention and of the MLP pass a norm; from 3 on
        queries and keys do.
      vocab_size: Number of token embeddings, V.
      width: Width of the residual stream, D.
      mlp_width: Width of each half of the gated MLP, M.
      num_heads: Query heads, N.
      num_kv_heads: Key heads, K.
      head_dim: Width of a head, H.
      layer_types: One `AttentionType` a layer (strings are accepted and converted).
      sliding_window: S, the keys that a query of a sliding layer sees, its own included.
      query_pre_attn_scalar: q; queries are multiplied by 1 / sqrt(q).
      rope_base: Base of the rotary embedding of full layers; of sliding ones it is 10,000.
      rope_stretch: What full layers divide positions by.
      attention_soft_cap: c in `tanh(score / c) * c`; 0 means no cap.
      logits_soft_cap: The same for logits.

    Raises:
      ValueError: A value is out of range, or values do not divide as they must.
    """

    version: int
    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[AttentionType, ...]
    sliding_window: int | None
    query_pre_attn_scalar: float
    rope_base: float = 10_000.0
    rope_stretch: float = 1.0
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the documented way to normalise a frozen dataclass
        if self.version not in VERSIONS:
            raise UserError(f"version must be one of {VERSIONS}, got {self.version!r}")
        if not isinstance(self.layer_types, list | tuple) or not self.layer_types:
            raise UserError(f"layer_types must list the layers, got {self.layer_types!r}")
        kinds = tuple(member(AttentionType, kind) for kind in self.layer_types)
        set_field(self, "layer_types", kinds)
        check_positive(self, "vocab_size", "width", "mlp_width", "num_heads", "num_kv_heads")
        check_positive(self, "head_dim")
        check_divisible(self, "num_heads", "num_kv_heads")
        window = self.sliding_window
        if AttentionType.SLIDING in kinds and (not isinstance(window, int) or window < 2):
            raise UserError(f"sliding_window must be an integer of at least 2, got {window!r}")
        for name in ("query_pre_attn_scalar", "rope_base", "rope_stretch"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)!r}")
            set_field(self, name, float(getattr(self, name)))
        for name in ("attention_soft_cap", "logits_soft_cap"):
            set_field(self, name, checked_cap(name, getattr(self, name)))

    @classmethod
    def from_sizes(
        cls,
        version: int,
        vocab_size: int,
        width: int,
        mlp_width: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        **changes: Any,
    ) -> GemmaConfig:
        """A config whose other fields follow the published ones; see `gemma_fields`."""
        if version not in VERSIONS:
            raise UserError(f"version must be one of {VERSIONS}, got {version!r}")
        sizes = (width, mlp_width, num_layers, num_heads, num_kv_heads, head_dim)
        return cls(vocab_size=vocab_size, **(gemma_fields(version, *sizes) | changes))

    @property
    def model(self) -> ModelConfig:
        return self._model

    @functools.cached_property
    def _model(self) -> ModelConfig:
        window = self.sliding_window
        ropes = {
            AttentionType.SLIDING: (None if window is None else window - 1, Rope()),
            AttentionType.FULL: (None, Rope(self.rope_base, stretch=self.rope_stretch)),
        }
        layers = tuple(self._layer(*ropes[kind]) for kind in self.layer_types)
        scale = math.sqrt(self.width)
        return ModelConfig(self.vocab_size, self.width, layers, scale, self.logits_soft_cap)

    def _layer(self, reach: int | None, rope: Rope) -> Layer:
        mixer = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            reach,
            rope,
            scale=self.query_pre_attn_scalar**-0.5,
            soft_cap=self.attention_soft_cap,
            qk_norm=self.version > 2,
        )
        return Layer(mixer, self.mlp_width, mlp_bias=False, post_norms=self.version > 1)

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def __repr__(self) -> str:
        fields = (f"{name}={value}" for name, value in self.describe().items())
        return f"GemmaConfig({', '.join(fields)})"

    def overridden(self, **fields: Any) -> GemmaConfig:
        changes = dict(fields)
        if changes.pop("embeddings_scale_by_sqrt_dim", True) is not True:
            raise UserError("a Gemma scales its embeddings by sqrt(width), got False")
        if "attention_window_size" in changes:  # W keys before a query's own
            changes["sliding_window"] = changes.pop("attention_window_size") + 1
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"layer_types": [kind.value for kind in self.layer_types]}

    def describe(self) -> dict[str, Any]:
        """The fields, with the initials of layer types."""
        kinds = "".join(kind.name[0] for kind in self.layer_types)
        return self.to_dict() | {"layer_types": kinds}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GemmaConfig:
        """The inverse of `to_dict`.

        Raises:
          ValueError: A field is missing, unknown (all are named) or invalid.
        """
        return cls(**checked_fields(cls, "Gemma", fields))


register_config("layer_types", GemmaConfig.from_dict)
