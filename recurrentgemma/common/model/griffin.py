"""The configuration as published: `GriffinConfig`, one way to write a `ModelConfig`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import (
    Config,
    Layer,
    ModelConfig,
    checked_cap,
    checked_fields,
    register_config,
)
from recurrentgemma.common.model.mixers import (
    Attention,
    Recurrent,
    Rope,
    check_divisible,
    check_positive,
)
from recurrentgemma.common.model.numerics import to_bfloat16
from recurrentgemma.common.model.params import positive_int, shapes_of
from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType, member

# What the shapes of a checkpoint cannot say.
_NOT_IN_SHAPES = ("embeddings_scale_by_sqrt_dim", "attention_window_size", "logits_soft_cap")
_OF_LAYERS = ("mlp_expanded_width", "num_heads", "lru_width")  # any size without layers


@dataclasses.dataclass(frozen=True, repr=False)
class GriffinConfig(Config):
    """Everything that defines a Griffin model. Frozen and hashable, so it can be a static argument.

    As published it was a named tuple: `_fields`, `_asdict`, `_replace` and unpacking work.

    Attributes:
      vocab_size: Number of token embeddings, V.
      width: Width of the residual stream, D.
      mlp_expanded_width: Width of each half of the gated MLP, M.
      num_heads: Query heads of local attention, and diagonal blocks of the RG-LRU's gates.
      block_types: One `TemporalBlockType` a layer (strings are accepted and converted).
      embeddings_scale_by_sqrt_dim: Whether token embeddings are multiplied by sqrt(D), rounded to
        bfloat16.
      attention_window_size: W. A query sees itself and the W tokens before it: W + 1 keys.
      logits_soft_cap: c in `tanh(logits / c) * c`; 0 means no cap.
      lru_width: Width of the recurrent branch, L; `None` means `width`.
      scan_type: Which implementation computes the linear recurrence.

    Raises:
      ValueError: A value is out of range, or values do not divide as they must.
    """

    vocab_size: int
    width: int
    mlp_expanded_width: int
    num_heads: int
    block_types: tuple[TemporalBlockType, ...]
    embeddings_scale_by_sqrt_dim: bool
    attention_window_size: int
    logits_soft_cap: float
    lru_width: int = None  # pyright: ignore[reportAssignmentType]  # an int after __post_init__
    scan_type: ScanType = ScanType.AUTO

    _fields: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the documented way to normalise a frozen dataclass
        if self.lru_width is None:
            set_field(self, "lru_width", self.width)
        if not isinstance(self.block_types, list | tuple):
            raise UserError(f"block_types must be a sequence, got {self.block_types!r}")
        blocks = tuple(member(TemporalBlockType, block) for block in self.block_types)
        set_field(self, "block_types", blocks)
        set_field(self, "scan_type", member(ScanType, self.scan_type))
        check_positive(self, "vocab_size", "width", "attention_window_size")
        if not isinstance(self.embeddings_scale_by_sqrt_dim, bool):
            raise UserError(
                "embeddings_scale_by_sqrt_dim must be True or False, "
                f"got {self.embeddings_scale_by_sqrt_dim!r}"
            )
        set_field(self, "logits_soft_cap", checked_cap("logits_soft_cap", self.logits_soft_cap))
        if not blocks:
            return
        check_positive(self, *_OF_LAYERS)
        check_divisible(self, "width", "num_heads")
        check_divisible(self, "lru_width", "num_heads")
        if TemporalBlockType.ATTENTION in blocks and self.head_dim % 4:
            raise UserError(
                "width / num_heads must be divisible by 4 (rotary embeddings turn the first half "
                f"of each head in pairs), got {self.head_dim} from width={self.width} "
                f"num_heads={self.num_heads}"
            )

    @property
    def model(self) -> ModelConfig:
        return self._model

    @functools.cached_property
    def _model(self) -> ModelConfig:
        sizes = (self.width, self.num_heads, self.attention_window_size, self.lru_width, 4)
        layers = tuple(
            published_layer(block, *sizes, self.mlp_expanded_width) for block in self.block_types
        )
        return ModelConfig(
            self.vocab_size,
            self.width,
            layers,
            self.embedding_scale,
            self.logits_soft_cap,
            self.scan_type,
        )

    @property
    def num_layers(self) -> int:
        return len(self.block_types)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def embedding_scale(self) -> float:
        """What token embeddings are multiplied by: 1, or sqrt(D) rounded to bfloat16."""
        return to_bfloat16(math.sqrt(self.width)) if self.embeddings_scale_by_sqrt_dim else 1.0

    @property
    def max_cache_length(self) -> int:
        """Keys that a local attention block keeps per sequence: the window size."""
        return self.attention_window_size

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def _replace(self, **changes: Any) -> GriffinConfig:
        return dataclasses.replace(self, **changes)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self._fields)

    def __repr__(self) -> str:
        fields = (f"{name}={value}" for name, value in self.describe().items())
        return f"GriffinConfig({', '.join(fields)})"

    @classmethod
    def from_preset(
        cls,
        preset: Preset | str,
        vocab_size: int = 256_000,
        max_sequence_length: int | None = None,
    ) -> GriffinConfig:
        """The configuration of a published model.

        Args:
          preset: A `Preset` or its name.
          vocab_size: Number of tokens.
          max_sequence_length: When no sequence is longer than this, the attention window (and so
            the cache) need not be either.

        Raises:
          ValueError: The preset is unknown.
        """
        known = member(Preset, preset)
        if known.config_dict.keys() - set(cls._fields):
            raise UserError(f"{known.name} is no Griffin: config_from_preset gives its config")
        fields = known.config_dict
        return cls(vocab_size=vocab_size, **_limit_window(fields, max_sequence_length))

    @classmethod
    def from_flax_params_or_variables(
        cls,
        flax_params_or_variables: Mapping[str, Any],
        preset: Preset | str | None = None,
        embeddings_scale_by_sqrt_dim: bool | None = None,
        attention_window_size: int | None = None,
        logits_soft_cap: float | None = None,
        scan_type: ScanType = ScanType.AUTO,
        max_sequence_length: int | None = None,
    ) -> GriffinConfig:
        """The configuration that fits a tree of Flax parameters, with or without a `params` level.

        Sizes and block types come from the shapes. The embedding scale, window and soft cap do not
        show there: they come from the arguments, else from `preset`, else from the one preset that
        has these shapes.

        Raises:
          ValueError: The tree is no Griffin model, or those three remain unknown.
        """
        tree = flax_params_or_variables
        return cls._from_shapes(
            shapes_of(tree.get("params", tree)),
            preset,
            dict(zip(_NOT_IN_SHAPES, (embeddings_scale_by_sqrt_dim, attention_window_size,
                                      logits_soft_cap), strict=True)),
            scan_type,
            max_sequence_length,
        )  # fmt: skip

    @classmethod
    def from_torch_params(
        cls,
        params: Mapping[str, Any],
        preset: Preset | str | None = None,
        embeddings_scale_by_sqrt_dim: bool | None = None,
        attention_window_size: int | None = None,
        logits_soft_cap: float | None = None,
        scan_type: ScanType = ScanType.AUTO,
        max_sequence_length: int | None = None,
    ) -> GriffinConfig:
        """The configuration that fits a PyTorch state dict; see `from_flax_params_or_variables`."""
        return cls._from_shapes(
            shapes_of(params),
            preset,
            dict(zip(_NOT_IN_SHAPES, (embeddings_scale_by_sqrt_dim, attention_window_size,
                                      logits_soft_cap), strict=True)),
            scan_type,
            max_sequence_length,
        )  # fmt: skip

    @classmethod
    def _from_shapes(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        preset: Preset | str | None,
        given: dict[str, Any],
        scan_type: ScanType,
        max_sequence_length: int | None,
    ) -> GriffinConfig:
        fields = _sizes_from_shapes(shapes)
        if preset is not None:
            known = member(Preset, preset).config_dict
        else:
            matches = [p for p in Preset if p.config_dict.items() >= _without_vocab(fields).items()]
            known = matches[0].config_dict if len(matches) == 1 else {}
        for name in _NOT_IN_SHAPES:
            fields[name] = given[name] if given[name] is not None else known.get(name)
        unknown = [name for name in _NOT_IN_SHAPES if fields[name] is None]
        if unknown:
            raise UserError(
                "these parameters have the shapes of no preset, and shapes do not tell "
                f"{', '.join(unknown)}: pass them, or a preset to take them from"
            )
        return cls(scan_type=scan_type, **_limit_window(fields, max_sequence_length))

    def overridden(self, **fields: Any) -> GriffinConfig:
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        fields = self._asdict()
        fields["block_types"] = [b.value for b in self.block_types]
        fields["scan_type"] = self.scan_type.value
        return fields

    def describe(self) -> dict[str, Any]:
        """The fields, with the initials of block types."""
        fields = self.to_dict() | {"block_types": "".join(b.name[0] for b in self.block_types)}
        del fields["scan_type"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GriffinConfig:
        """The inverse of `to_dict`.

        Raises:
          ValueError: A field is missing, unknown (all are named) or invalid.
        """
        return cls(**checked_fields(cls, "Griffin", fields))

    @classmethod
    def from_json(cls, text: str) -> GriffinConfig:
        """The inverse of `to_json`; `ValueError` when it is not JSON or not a configuration."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise UserError(f"a configuration is a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)


def local_attention(width: int, num_heads: int, window: int) -> Attention:
    """The local attention of Griffin: one key head, half of each head turned."""
    if width % positive_int("num_heads", num_heads):
        raise UserError(f"width must be divisible by num_heads, got {width=} {num_heads=}")
    head_dim = width // num_heads
    rope, scale = Rope(share=0.5), head_dim**-0.5
    return Attention(num_heads, 1, head_dim, window, rope, scale, out_bias=True)


def published_layer(
    block_type: TemporalBlockType,
    width: int,
    num_heads: int,
    window: int,
    lru_width: int | None = None,
    taps: int = 4,
    mlp: int = 1,
) -> Layer:
    """A layer of Griffin from the sizes of a `GriffinConfig`."""
    if block_type is TemporalBlockType.ATTENTION:
        mixer = local_attention(width, num_heads, window)
    else:
        mixer = Recurrent(lru_width or width, num_heads, taps)
    return Layer(mixer, mlp, mlp_bias=True)


def _sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What shapes say of a configuration, from arrays named and shaped alike in both frameworks.

    The first block that has an array says its size, so that some may be missing.
    """
    problems = []

    def shape(rank: int, *paths: str) -> tuple[int, ...]:
        found = next((path for path in paths if path in shapes), None)
        if found is None:
            problems.append(f"no {paths[0]!r}")
        elif len(shapes[found]) != rank:
            problems.append(f"{found!r} must have {rank} axes, got shape {shapes[found]}")
        else:
            return shapes[found]
        return (1,) * rank

    numbers = [re.match(r"blocks\.(\d{1,4})\.", path) for path in shapes]
    count = max((int(match[1]) + 1 for match in numbers if match), default=0)
    recurrent, attention = (
        [i for i in range(count) if any(path.startswith(f"blocks.{i}.{kind}") for path in shapes)]
        for kind in ("recurrent_block.", "attention_block.")
    )
    problems += [
        f"no temporal block in 'blocks.{i}'" for i in range(count) if i not in recurrent + attention
    ]
    vocab_size, width = shape(2, "embedder.input_embedding")
    mlp = [f"blocks.{i}.mlp_block.ffw_up.w" for i in range(max(count, 1))]
    mlp_expanded_width = shape(3, *mlp)[2]
    if recurrent:
        rg_lru = [f"blocks.{i}.recurrent_block.rg_lru" for i in recurrent]
        (lru_width,) = shape(1, *(f"{path}.a_param" for path in rg_lru))
        num_heads = shape(3, *(f"{path}.a_gate.w" for path in rg_lru))[0]
    else:
        # The one key head: (width, head_dim) in Flax, (head_dim, width) in PyTorch.
        keys = [f"blocks.{i}.attention_block.proj_k" for i in attention or [0]]
        proj_k = shape(2, *(f"{path}.{leaf}" for path in keys for leaf in ("kernel", "weight")))
        head_dim = math.prod(proj_k) // width
        lru_width, num_heads = width, width // max(head_dim, 1)
    if problems:
        raise UserError(f"these are not the parameters of a Griffin model: {', '.join(problems)}")
    return {
        "vocab_size": vocab_size,
        "width": width,
        "mlp_expanded_width": mlp_expanded_width,
        "num_heads": num_heads,
        "lru_width": lru_width,
        "block_types": tuple(
            TemporalBlockType.RECURRENT if i in recurrent else TemporalBlockType.ATTENTION
            for i in range(count)
        ),
    }


def _without_vocab(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "vocab_size"}


def _limit_window(fields: Mapping[str, Any], max_sequence_length: int | None) -> dict[str, Any]:
    if max_sequence_length is None:
        return dict(fields)
    limit = positive_int("max_sequence_length", max_sequence_length)
    window = min(fields["attention_window_size"], limit)
    return dict(fields) | {"attention_window_size": window}


GriffinConfig._fields = tuple(f.name for f in dataclasses.fields(GriffinConfig))
register_config("block_types", GriffinConfig.from_dict)
