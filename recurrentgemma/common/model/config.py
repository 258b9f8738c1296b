"""A model as a value: its layers, each with its mixer, and how it is stored as JSON."""

from __future__ import annotations

import abc
import dataclasses
import json
import sys
from collections.abc import Callable, Container, Mapping
from typing import Any, Self

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.mixers import MIXERS, Mixer, check_positive
from recurrentgemma.common.model.presets import ScanType, member


class Config(abc.ABC):
    """What every configuration offers: `model`, its value as a `ModelConfig`, and JSON.

    Attributes:
      vocab_size: Number of token embeddings, V.
      width: Width of the residual stream, D.
      scan_type: Which implementation computes a linear recurrence: how, not what, a model computes.
    """

    vocab_size: int
    width: int
    scan_type: ScanType = ScanType.AUTO

    @property
    @abc.abstractmethod
    def model(self) -> ModelConfig:
        """The model as a value."""

    @property
    @abc.abstractmethod
    def num_layers(self) -> int:
        """Number of layers."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `config_from_dict` is the inverse."""

    def overridden(self, **fields: Any) -> Self:
        """The configuration with the fields of `GriffinConfig` that a caller may state.

        Raises:
          ValueError: It has no such field.
        """
        if fields:
            raise UserError(f"the config states its layers: nothing overrides {', '.join(fields)}")
        return self

    def to_json(self) -> str:
        """The configuration as a JSON object, one field a line."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def describe(self) -> dict[str, Any]:
        """The fields to compare and to show; layers are shortened."""
        return self.model.describe()

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """The fields in which two configs differ, each with both values.

        The scan type is left out: it does not change what a model is.
        """
        one, two = self.describe(), other.describe()
        if one.keys() != two.keys():
            one, two = self.model.describe(), other.model.describe()
        return {name: (one[name], two[name]) for name in one if one[name] != two[name]}


@dataclasses.dataclass(frozen=True)
class Layer:
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Attributes:
      mixer: How the layer mixes information over time.
      mlp: Width of each half of the gated MLP, M.
      mlp_bias: Whether the MLP has biases.
      post_norms: Whether the outputs of the mixer and of the MLP pass a norm of their own.
    """

    mixer: Mixer
    mlp: int
    mlp_bias: bool
    post_norms: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "mlp")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """What a model is. Frozen and hashable, so it can be a static argument.

    Attributes:
      vocab_size: Number of token embeddings, V.
      width: Width of the residual stream, D.
      layers: The layers.
      embedding_scale: What token embeddings are multiplied by; it is first rounded to their dtype.
      soft_cap: c in `tanh(logits / c) * c`; 0 means no cap.
      scan_type: Which implementation computes a linear recurrence.

    Raises:
      ValueError: A value is out of range.
    """

    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    embedding_scale: float = 1.0
    soft_cap: float = 0.0
    scan_type: ScanType = ScanType.AUTO

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the documented way to normalise a frozen dataclass
        check_positive(self, "vocab_size", "width")
        set_field(self, "layers", tuple(self.layers))
        set_field(self, "scan_type", member(ScanType, self.scan_type))
        set_field(self, "soft_cap", checked_cap("soft_cap", self.soft_cap))

    def __repr__(self) -> str:
        fields = (f"{name}={value}" for name, value in self.describe().items())
        return f"ModelConfig({', '.join(fields)})"

    @property
    def model(self) -> ModelConfig:
        return self

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def describe(self) -> dict[str, Any]:
        """The fields; each kind of layer has a letter, and `layers` is a word of these."""
        letters = {layer: chr(ord("a") + i) for i, layer in enumerate(dict.fromkeys(self.layers))}
        kinds = (f"{letter} = {_short(layer)}" for layer, letter in letters.items())
        layers = "; ".join(["".join(letters[layer] for layer in self.layers), *kinds])
        return {
            "vocab_size": self.vocab_size,
            "width": self.width,
            "layers": layers,
            "embedding_scale": self.embedding_scale,
            "soft_cap": self.soft_cap,
        }

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["layers"] = [_layer_to_dict(layer) for layer in self.layers]
        fields["scan_type"] = self.scan_type.value
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
          ValueError: A field is missing, unknown or invalid.
        """
        try:
            layers = tuple(_layer_from_dict(layer) for layer in fields["layers"])
            return cls(**{**fields, "layers": layers})
        except (KeyError, TypeError) as error:
            raise UserError(f"not the configuration of a model: {error}") from error


def _short(layer: Layer) -> str:
    changed = [
        f"{f.name}={getattr(layer.mixer, f.name)!r}"
        for f in dataclasses.fields(layer.mixer)  # pyright: ignore[reportArgumentType]
        if getattr(layer.mixer, f.name) != f.default
    ]
    parts = [f"{layer.mixer.kind}({', '.join(changed)})", f"mlp {layer.mlp}"]
    parts += ["biases"] * layer.mlp_bias + ["post norms"] * layer.post_norms
    return " + ".join(parts)


def _layer_to_dict(layer: Layer) -> dict[str, Any]:
    fields = dataclasses.asdict(layer)
    fields["mixer"] = {"kind": layer.mixer.kind, **fields["mixer"]}
    return fields


def _layer_from_dict(fields: Mapping[str, Any]) -> Layer:
    mixer = dict(fields["mixer"])
    kind = mixer.pop("kind", None)
    if kind not in MIXERS:
        raise UserError(f"a mixer's kind must be one of {', '.join(MIXERS)}, got {kind!r}")
    return Layer(**{**fields, "mixer": MIXERS[kind](**mixer)})


def checked_cap(name: str, cap: Any) -> float:
    """A soft cap as a float, or `ValueError`."""
    is_number = isinstance(cap, int | float) and not isinstance(cap, bool)
    if not is_number or not 0 <= cap <= sys.float_info.max:
        raise UserError(f"{name} must be finite and at least 0, got {cap!r}")
    return float(cap)


def checked_fields(kind: type[Any], name: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields themselves, if they are those of a class of configurations.

    Raises:
      ValueError: One is missing, and has no default, or unknown; all are named.
    """
    known = dataclasses.fields(kind)
    required = {f.name for f in known if f.default is dataclasses.MISSING}
    unknown = set(fields) - {f.name for f in known}
    problems = [f"unknown field {field!r}" for field in sorted(unknown)]
    problems += [f"missing field {field!r}" for field in sorted(required - set(fields))]
    if problems:
        raise UserError(f"not a {name} configuration: {', '.join(problems)}")
    return fields


# How the fields of a configuration tell its class: the first whose key is there reads them.
_CLASSES: dict[str, Callable[[Mapping[str, Any]], Config]] = {"layers": ModelConfig.from_dict}


def register_config(key: str, from_dict: Callable[[Mapping[str, Any]], Config]) -> None:
    """Makes a class of configurations known to `config_from_dict` by a key that only it has."""
    _CLASSES[key] = from_dict


def config_from_dict(fields: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` gave.

    Raises:
      ValueError: A field is missing, unknown (all are named) or invalid.
    """
    from_dict = next((_CLASSES[key] for key in _CLASSES if key in fields), None)
    if from_dict is None:
        raise UserError(
            "the fields of a configuration must have one of "
            f"{', '.join(_CLASSES)}, got {', '.join(fields) or 'none'}"
        )
    return from_dict(fields)


def config_from_json(text: str, beside: Container[str] = ()) -> Config:
    """The configuration that `to_json` gave; `ValueError` when the text holds none.

    Args:
      text: A JSON object.
      beside: Fields of it that are not the configuration's.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise UserError(f"a configuration is a JSON object, got {type(fields).__name__}")
    return config_from_dict({name: fields[name] for name in fields if name not in beside})
