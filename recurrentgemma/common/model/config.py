"""The configuration of a Griffin model: what it is, where it comes from, how it is stored."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re
import sys
from collections.abc import Mapping
from typing import Any

from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType, member

# What the shapes of a checkpoint cannot say.
_NOT_IN_SHAPES = ("embeddings_scale_by_sqrt_dim", "attention_window_size", "logits_soft_cap")
_LARGEST = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class GriffinConfig:
    """Everything that defines a Griffin model. Frozen and hashable, so it can be a static argument.

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

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the documented way to normalise a frozen dataclass
        if self.lru_width is None:
            set_field(self, "lru_width", self.width)
        for name in (
            "vocab_size",
            "width",
            "mlp_expanded_width",
            "num_heads",
            "lru_width",
            "attention_window_size",
        ):
            set_field(self, name, _positive_int(name, getattr(self, name)))
        if not isinstance(self.block_types, list | tuple):
            raise ValueError(f"block_types must be a sequence, got {self.block_types!r}")
        set_field(
            self, "block_types", tuple(member(TemporalBlockType, b) for b in self.block_types)
        )
        set_field(self, "scan_type", member(ScanType, self.scan_type))
        if not self.block_types:
            raise ValueError("block_types must name at least one block, got none")
        if not isinstance(self.embeddings_scale_by_sqrt_dim, bool):
            raise ValueError(
                "embeddings_scale_by_sqrt_dim must be True or False, "
                f"got {self.embeddings_scale_by_sqrt_dim!r}"
            )
        cap = self.logits_soft_cap
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 <= cap <= _LARGEST:
            raise ValueError(f"logits_soft_cap must be finite and at least 0, got {cap!r}")
        set_field(self, "logits_soft_cap", float(cap))
        if self.width % self.num_heads:
            raise ValueError(
                "width must be divisible by num_heads, "
                f"got width={self.width} num_heads={self.num_heads}"
            )
        if self.lru_width % self.num_heads:
            raise ValueError(
                "lru_width must be divisible by num_heads, "
                f"got lru_width={self.lru_width} num_heads={self.num_heads}"
            )
        if TemporalBlockType.ATTENTION in self.block_types and self.head_dim % 4:
            raise ValueError(
                "width / num_heads must be divisible by 4 (rotary embeddings turn the first half "
                f"of each head in pairs), got {self.head_dim} from width={self.width} "
                f"num_heads={self.num_heads}"
            )

    @property
    def num_layers(self) -> int:
        """Number of residual blocks."""
        return len(self.block_types)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def embedding_scale(self) -> float:
        """What token embeddings are multiplied by: 1, or sqrt(D) rounded to bfloat16."""
        if not self.embeddings_scale_by_sqrt_dim:
            return 1.0
        fraction, exponent = math.frexp(math.sqrt(self.width))
        return math.ldexp(round(fraction * 2**8), exponent - 8)

    @property
    def max_cache_length(self) -> int:
        """Keys that a local attention block keeps per sequence: the window size."""
        return self.attention_window_size

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
        fields = member(Preset, preset).config_dict
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
            raise ValueError(
                "these parameters have the shapes of no preset, and shapes do not tell "
                f"{', '.join(unknown)}: pass them, or a preset to take them from"
            )
        return cls(scan_type=scan_type, **_limit_window(fields, max_sequence_length))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["block_types"] = [b.value for b in self.block_types]
        fields["scan_type"] = self.scan_type.value
        return fields

    def differences(self, other: GriffinConfig) -> dict[str, tuple[Any, Any]]:
        """What this model and another have otherwise, by field; of block types the initials.

        Which scan computes the recurrence is not part of what a model is.
        """
        one, two = (
            config.to_dict() | {"block_types": "".join(b.name[0] for b in config.block_types)}
            for config in (self, other)
        )
        return {
            name: (one[name], two[name])
            for name in one
            if name != "scan_type" and one[name] != two[name]
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GriffinConfig:
        """The inverse of `to_dict`.

        Raises:
          ValueError: A field is missing, unknown (all are named) or invalid.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        required = names - {"lru_width", "scan_type"}
        problems = [f"unknown field {name!r}" for name in sorted(set(fields) - names)]
        problems += [f"missing field {name!r}" for name in sorted(required - set(fields))]
        if problems:
            raise ValueError("not a Griffin configuration: " + ", ".join(problems))
        return cls(**fields)

    def to_json(self) -> str:
        """The configuration as a JSON object, one field a line."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GriffinConfig:
        """The inverse of `to_json`; `ValueError` when it is not JSON or not a configuration."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a configuration is a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)


def shapes_of(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a nested mapping, by its dotted path."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            shapes |= {f"{key}.{path}": shape for path, shape in shapes_of(value).items()}
        else:
            shapes[str(key)] = tuple(value.shape)
    return shapes


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
        raise ValueError(f"these are not the parameters of a Griffin model: {', '.join(problems)}")
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
    limit = _positive_int("max_sequence_length", max_sequence_length)
    window = min(fields["attention_window_size"], limit)
    return dict(fields) | {"attention_window_size": window}


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if operator.index(value) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r}")
    return operator.index(value)
