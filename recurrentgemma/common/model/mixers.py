"""The ways in which a layer mixes information over time, each a value.

A mixer declares its parameters and its state once. The reference and each twin register what
computes it, by its class; everything else loops over these declarations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.params import (
    Params,
    ParamSpec,
    StateSpec,
    conv_1d,
    linear,
    positive_int,
    rg_lru,
    rms_norm,
    under,
)

CAPACITY_BLOCK = 256  # a growing state has room for a multiple of so many tokens


class Mixer(Protocol):
    """What every mixer has; it is a frozen dataclass.

    Attributes:
      kind: Its name in JSON; its parameters are under `{kind}_block`.
      cache: The named tuple that holds its state, with the fields of `state`.

    A mixer may have `parts`, a mapping from logical axes to the number of parts, heads say, that
    one device computes whole; other axes divide anywhere.
    """

    kind: ClassVar[str]
    cache: ClassVar[type]

    def params(self, width: int, variance: float) -> Iterator[ParamSpec]:
        """Its parameters in a stream of a width, the output's variance being `variance`."""
        ...

    def state(self, capacity: int) -> Iterator[StateSpec]:
        """The arrays of its state, in the order of the cache's fields."""
        ...


_M = TypeVar("_M", bound=type[Any])
MIXERS: dict[str, type[Any]] = {}


def register_mixer(mixer: _M) -> _M:
    """Makes a mixer known by its kind, for the JSON of a model; a class decorator."""
    MIXERS[mixer.kind] = mixer
    return mixer


def block_name(mixer: Any) -> str:
    """The name of the mixer's module in its layer."""
    return f"{mixer.kind}_block"


class RecurrentBlockCache(NamedTuple):
    """The state of a recurrent block.

    Attributes:
      rg_lru_state: h of the RG-LRU, float32 or wider, [B, L].
      conv1d_state: The last inputs of the convolution in the current document, oldest first, zeros
        where the document has had fewer, [B, taps - 1, L].
    """

    rg_lru_state: Any
    conv1d_state: Any


class AttentionBlockCache(NamedTuple):
    """The state of an attention block: a ring over the current document's last S tokens.

    S is the reach, or the capacity where the reach has no limit.

    Attributes:
      keys: Rotated keys; the token at position p of its document is at slot p mod S, zeros where
        there is none, [B, S, K, H].
      values: Values, in the same slots.
      num_tokens: How many tokens of the current document have been seen, [B].
    """

    keys: Any
    values: Any
    num_tokens: Any


@register_mixer
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """The recurrent block of Griffin (arXiv 2402.19427, section 2.3).

    Attributes:
      width: Width of the recurrent branch, L.
      gate_blocks: Diagonal blocks of the RG-LRU's gates.
      taps: Inputs that the convolution sees.
    """

    width: int
    gate_blocks: int
    taps: int = 4

    kind: ClassVar[str] = "recurrent"
    cache: ClassVar[type] = RecurrentBlockCache

    def __post_init__(self) -> None:
        check_positive(self, "width", "gate_blocks", "taps")
        check_divisible(self, "width", "gate_blocks")

    @property
    def parts(self) -> dict[str, int]:
        """The blocks of the gates, and the channels that pass them."""
        return {"lru": self.gate_blocks}

    def params(self, width: int, variance: float) -> Params:
        for name in ("linear_y", "linear_x"):
            branch = linear((width, self.width), ("width", "lru"), "recurrent")
            yield from under(name, branch)
        yield from under("conv_1d", conv_1d(self.width, self.taps))
        yield from under("rg_lru", rg_lru(self.width, self.gate_blocks))
        out = linear((self.width, width), ("lru", "width"), "recurrent", variance)
        yield from under("linear_out", out)

    def state(self, capacity: int) -> Iterator[StateSpec]:
        del capacity
        yield StateSpec("rg_lru_state", (self.width,), "wide", ("lru",))
        shape = (self.taps - 1, self.width)
        yield StateSpec("conv1d_state", shape, "compute", ("conv", "lru"))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      base: Dimension i of the turned part, of size R, turns by `base` ** (-2 i / R) a position.
      share: The share of each head that turns; the rest passes through.
      stretch: What positions are divided by.
    """

    base: float = 10_000.0
    share: float = 1.0
    stretch: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not self.base > 0 or not self.stretch > 0:
            raise UserError(
                "a rope needs a base and a stretch above 0 and a share in [0, 1], "
                f"got base={self.base} share={self.share} stretch={self.stretch}"
            )


@register_mixer
@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention in which groups of query heads share a key head.

    Attributes:
      heads: Query heads, N.
      kv_heads: Key heads, K; query head n uses key head n // (N / K).
      head_dim: Width of a head, H.
      reach: Keys that a query sees before its own: W in Griffin; None sees them all.
      rope: How positions turn queries and keys.
      scale: What queries are multiplied by.
      soft_cap: c in tanh(score / c) * c, before the mask; 0 means no cap.
      qk_norm: Whether queries and keys pass an RMSNorm over H before they turn.
      out_bias: Whether the output projection has a bias.
    """

    heads: int
    kv_heads: int
    head_dim: int
    reach: int | None
    rope: Rope
    scale: float
    soft_cap: float = 0.0
    qk_norm: bool = False
    out_bias: bool = False

    kind: ClassVar[str] = "attention"
    cache: ClassVar[type] = AttentionBlockCache

    def __post_init__(self) -> None:
        if isinstance(self.rope, dict):
            object.__setattr__(self, "rope", Rope(**self.rope))
        check_positive(self, "heads", "kv_heads", "head_dim")
        if self.reach is not None:
            check_positive(self, "reach")
        check_divisible(self, "heads", "kv_heads")
        if self.turned % 2 or self.turned != self.head_dim * self.rope.share:
            raise UserError(
                "rope turns pairs: head_dim * share must be an even integer, "
                f"got head_dim={self.head_dim} share={self.rope.share}"
            )
        if not self.soft_cap >= 0:
            raise UserError(f"soft_cap must be at least 0, got {self.soft_cap}")

    @property
    def turned(self) -> int:
        """Dimensions of a head that turn."""
        return int(self.head_dim * self.rope.share)

    @property
    def parts(self) -> dict[str, int]:
        """The heads."""
        return {"heads": self.heads, "kv": self.kv_heads}

    def params(self, width: int, variance: float) -> Params:
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            axes = ("width", "heads" if name == "q" else "kv")
            projection = linear((width, heads * self.head_dim), axes, "attention", bias=False)
            yield from under(f"proj_{name}", projection)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield from under(name, rms_norm(self.head_dim, "head"))
        sizes = (self.heads * self.head_dim, width)
        out = linear(sizes, ("heads", "width"), "attention", variance, self.out_bias)
        yield from under("proj_final", out)

    def state(self, capacity: int) -> Iterator[StateSpec]:
        slots = capacity if self.reach is None else self.reach
        shape, axes = (slots, self.kv_heads, self.head_dim), ("slots", "kv", "head")
        for field in ("keys", "values"):
            yield StateSpec(field, shape, "compute", axes, grows=self.reach is None)
        yield StateSpec("num_tokens", (), "int32", ())


def check_positive(value: Any, *names: str) -> None:
    """Makes the fields of a frozen dataclass plain integers; `ValueError` if one is below 1."""
    for name in names:
        object.__setattr__(value, name, positive_int(name, getattr(value, name)))


def check_divisible(value: Any, name: str, divisor: str) -> None:
    """Raises `ValueError` unless one field is a multiple of another."""
    whole, part = getattr(value, name), getattr(value, divisor)
    if whole % part:
        raise UserError(
            f"{name} must be divisible by {divisor}, got {name}={whole} {divisor}={part}"
        )
