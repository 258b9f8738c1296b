"""Parameters and state as data, and the parameters of each layer, declared from its sizes.

A layer's function lists its parameters by their paths from that layer. A block composes the lists
of its layers, and `layer_spec` those of the blocks, so that every size is said once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.init import Init, Normal, RingLog, Zeros


class ParamSpec(NamedTuple):
    """One parameter.

    Attributes:
      path: Dotted path, in a model that of the Flax tree (where "blocks.N" is one level).
      shape: Shape in the Flax layout.
      init: Distribution of initial values.
      axes: Logical name of each axis; sharding rules read these.
      decay: Whether weight decay applies.
      lora: The group of LoRA targets this parameter belongs to, if any.
      matrix: Whether it is a matrix, or a stack of matrices, that may be quantised.
      wide: Whether it is computed with in float32 or wider, whatever its own dtype; the others meet
        in matrix products, which take one dtype.
      table: Whether it is a table of rows that may be quantised, each an output of a product.
    """

    path: str
    shape: tuple[int, ...]
    init: Init
    axes: tuple[str, ...]
    decay: bool = False
    lora: str | None = None
    matrix: bool = False
    wide: bool = False
    table: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class StateSpec(NamedTuple):
    """One array of a state.

    Attributes:
      path: "blocks.N.field"; in a mixer's own list the field alone.
      shape: Shape of one row, without the batch axis.
      dtype: "compute" (of keys, values and inputs), "wide" (float32 or wider) or "int32".
      axes: Logical name of each axis of `shape`; "slots" holds a place for each token.
      grows: Whether the axis "slots" grows with the text, up to a capacity.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    grows: bool = False


Params = Iterator[ParamSpec]
_Spec = TypeVar("_Spec", ParamSpec, StateSpec)


def tree_keys(path: str) -> list[str]:
    """The keys of a path in a tree of parameters, where "blocks.N" is one key."""
    keys = path.split(".")
    return [".".join(keys[:2]), *keys[2:]] if keys[0] == "blocks" else keys


def under(prefix: str, specs: Iterable[_Spec]) -> Iterator[_Spec]:
    """The specs with their paths put under a prefix."""
    return (spec._replace(path=f"{prefix}.{spec.path}") for spec in specs)


def shapes_of(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a nested mapping, by its dotted path."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            shapes |= {f"{key}.{path}": shape for path, shape in shapes_of(value).items()}
        else:
            shapes[str(key)] = tuple(value.shape)
    return shapes


def positive_int(name: str, value: Any) -> int:
    """A positive integer below 2^63 as a plain one, or `ValueError`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise UserError(f"{name} must be a positive integer, got {value!r}")
    if operator.index(value) >= 2**63:
        raise UserError(f"{name} must be below 2**63, got {value!r}")
    return operator.index(value)


def require_positive(**sizes: Any) -> None:
    """Raises `ValueError` for a size that is no positive integer."""
    for name, size in sizes.items():
        positive_int(name, size)


def rms_norm(width: int, axis: str = "width") -> Params:
    """RMSNorm."""
    require_positive(width=width)
    yield ParamSpec("scale", (width,), Zeros(), (axis,), wide=True)


def embedder(vocab_size: int, width: int) -> Params:
    """The table of token embeddings."""
    require_positive(vocab_size=vocab_size, embed_dim=width)
    init = Normal(math.sqrt(1 / width))
    yield ParamSpec("input_embedding", (vocab_size, width), init, ("vocab", "width"), table=True)


def linear(
    sizes: tuple[int, int],
    axes: tuple[str, str] = ("", ""),
    lora: str | None = None,
    variance: float = 1.0,
    bias: bool = True,
) -> Params:
    """A dense layer whose kernel has variance `variance` / fan-in."""
    require_positive(width=sizes[0], width_out=sizes[1])
    init = Normal(math.sqrt(variance / sizes[0]))
    yield ParamSpec("kernel", sizes, init, axes, decay=True, lora=lora, matrix=lora is not None)
    if bias:
        yield ParamSpec("bias", sizes[1:], Zeros(), axes[1:])


def einsum(
    w_shape: Sequence[int],
    b_shape: Sequence[int] | None,
    variance: float = 1.0,
    axes: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
    lora: str | None = None,
) -> Params:
    """A weight with axes [..., in, out], whose variance is `variance` / in, and a bias."""
    require_positive(**{f"w_shape[{i}]": size for i, size in enumerate(w_shape)})
    w_axes, b_axes = axes or (("",) * len(w_shape), ("",) * len(b_shape or ()))
    init = Normal(math.sqrt(variance / w_shape[-2]))
    yield ParamSpec("w", tuple(w_shape), init, w_axes, True, lora, matrix=lora is not None)
    if b_shape is not None:
        yield ParamSpec("b", tuple(b_shape), Zeros(), b_axes)


def block_diagonal(
    width: int, num_blocks: int, width_out: int | None = None, variance: float = 1.0
) -> Params:
    """A dense layer for each of the equal parts of the last axis."""
    require_positive(width=width, num_blocks=num_blocks, width_out=width_out or width)
    for name, whole in (("width", width), ("width_out", width_out or width)):
        if whole % num_blocks:
            raise UserError(
                f"{name} must be divisible by num_blocks, got {name}={whole} {num_blocks=}"
            )
    size, size_out = width // num_blocks, (width_out or width) // num_blocks
    axes = ("heads", "head_in", "head_out")
    init = Normal(math.sqrt(variance / size))
    yield ParamSpec("w", (num_blocks, size, size_out), init, axes, lora="gates", matrix=True)
    yield ParamSpec("b", (num_blocks, size_out), Zeros(), ("heads", "head_out"))


def conv_1d(width: int, taps: int, variance: float = 0.01) -> Params:
    """A depthwise convolution."""
    require_positive(width=width, temporal_width=taps)
    init = Normal(math.sqrt(variance / taps))
    yield ParamSpec("w", (taps, width), init, ("conv", "lru"), decay=True, wide=True)
    yield ParamSpec("b", (width,), Zeros(), ("lru",), wide=True)


def a_param(width: int, min_radius: float = 0.9) -> Params:
    """The RG-LRU's own parameter, beside its gates."""
    yield ParamSpec("a_param", (width,), RingLog(min_radius, 0.999), ("lru",), wide=True)


def rg_lru(width: int, num_blocks: int, variance: float = 1.0, min_radius: float = 0.9) -> Params:
    """The RG-LRU."""
    yield from a_param(width, min_radius)
    for gate in ("input_gate", "a_gate"):
        yield from under(gate, block_diagonal(width, num_blocks, variance=variance))


def mlp(width: int, expanded: int, bias: bool = True, variance: float = 1.0) -> Params:
    """The gated MLP; `variance` is that of the output projection."""
    axes = ("gate", "width", "mlp"), ("gate", "batch", "time", "mlp")
    b_shape = (2, 1, 1, expanded) if bias else None
    yield from under("ffw_up", einsum((2, width, expanded), b_shape, axes=axes, lora="mlp"))
    down = linear((expanded, width), ("mlp", "width"), "mlp", variance, bias)
    yield from under("ffw_down", down)
