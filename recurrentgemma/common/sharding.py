"""How a model is laid out over many devices: which mesh axis splits which axis of each array.

A mesh is a mapping from the names of its axes to their sizes, as `parse_mesh` returns it. A split
names a mesh axis for each axis of an array, None where the array stays whole. Both twins lay out
weights, moments, adapters, activations and states as this module says.

Mesh axes:

- "data" splits the rows of a batch; every device has all weights.
- "fsdp" splits the rows and, at rest, the weights: a layer's are gathered when it computes.
- "sequence" splits the tokens of a row and, at rest, the weights.
- "tensor" splits the heads, the recurrence, the MLP and the vocabulary: a device computes its part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec, state_spec
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs

Mesh = Mapping[str, int]
Split = tuple[str | None, ...]
Rules = tuple[tuple[str, str | None], ...]

AXES = ("data", "fsdp", "sequence", "tensor")  # the last is innermost: its devices are neighbours
STRATEGIES = ("data", "fsdp", "tensor", "fsdp+tensor", "sequence", "fsdp+sequence")
BATCH_AXES = ("data", "fsdp")
TOKEN_AXES = (*BATCH_AXES, "sequence")  # they split the tokens of a batch
LARGEST = "*"  # in a rule: the largest axis still free that the mesh axis divides
# The first rule that fits wins, and an array uses a mesh axis once.
RULES: Rules = (
    *((axis, "tensor") for axis in ("vocab", "mlp", "lru", "heads", "kv")),
    (LARGEST, "fsdp"),
    (LARGEST, "sequence"),
)
_NEVER = ("gate", "conv", "batch", "time", "rank")  # axes that no `LARGEST` takes
_REPLICATED = 0.02  # the largest share of the values that a mesh axis may leave whole
_SHOWN = 4


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """The mesh that a text such as "fsdp=-1,tensor=4" names, its axes in the order of `AXES`.

    Args:
      text: Names and sizes; -1, or a name alone, takes the devices that the others leave.
      devices: The number of devices.

    Raises:
      ValueError: An axis is unknown or named twice, two sizes are -1, the sizes do not divide the
        devices, or there are too few devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise UserError(
                f"a mesh has the axes {', '.join(AXES)}, as in fsdp=4,tensor=2, got {text!r}"
            )
        if name in sizes:
            raise UserError(f"a mesh names each axis once, got {name} twice in {text!r}")
        try:
            sizes[name] = int(size or -1)
        except ValueError:
            sizes[name] = 0
        if sizes[name] < 1 and sizes[name] != -1:
            raise UserError(f"the size of {name} must be a positive integer or -1, got {size!r}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(
            "only one axis of a mesh may take the rest of the devices (-1), "
            f"got {' and '.join(free)}"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if known > devices or devices % known:
            raise UserError(
                f"the sizes of {text!r} must divide the number of devices, got {known} and "
                f"{devices}; sizes that do: {_listed(_divisors(devices))}"
            )
        sizes[free[0]] = devices // known
    elif known > devices:
        raise UserError(f"the mesh {text!r} needs {known} devices, there are {devices}")
    return {name: sizes[name] for name in AXES if name in sizes}


def mesh_text(mesh: Mesh) -> str:
    """The text that `parse_mesh` reads."""
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def strategy(mesh: Mesh, offered: Sequence[str] = STRATEGIES) -> str:
    """Which of `STRATEGIES` a mesh is; "data" for one device.

    Args:
      mesh: The mesh.
      offered: The strategies that it may be.

    Raises:
      ValueError: It is no such strategy.
    """
    name = "+".join(axis for axis in AXES if mesh.get(axis, 1) > 1) or "data"
    if name not in offered:
        raise UserError(
            f"a mesh must be one of {', '.join(offered)}, got {mesh_text(mesh)}, which is {name}"
        )
    return name


def layout(
    config: Config, mesh: Mesh, lora: LoraOptions | None = None, rules: Rules = ()
) -> dict[str, Split]:
    """How each parameter is split, by path; with `lora` the adapters', too.

    Args:
      config: The model.
      mesh: The mesh.
      lora: Adapters beside the parameters, if any.
      rules: Pairs of a logical axis (`ParamSpec.axes`, or `LARGEST`) and the mesh axis that splits
        it, or None to keep the axis whole; they come before `RULES`.

    Raises:
      ValueError: A rule names an unknown mesh axis, or the mesh does not fit; see `require_fit`.
    """
    if unknown := {axis for _, axis in rules if axis is not None} - {*AXES}:
        raise UserError(f"rules map to the axes {', '.join(AXES)}, got {', '.join(unknown)}")
    splits = _splits(config, tuple(mesh.items()), lora, tuple(rules))
    require_fit(config, mesh, rules=rules)
    return dict(splits)


def each_split(config: Config, mesh: Mesh, lora: LoraOptions | None = None) -> dict[str, Split]:
    """`layout`, also where the mesh leaves more values whole than it may."""
    return dict(_splits(config, tuple(mesh.items()), lora, ()))


@functools.lru_cache(maxsize=64)
def _splits(config: Config, mesh: tuple, lora: LoraOptions | None, rules: Rules):
    specs = layer_spec(config) + (trainable_specs(config, lora) if lora else ())
    return {spec.path: split_of(spec, dict(mesh), rules, _parts(config, spec)) for spec in specs}


def split_of(
    spec: ParamSpec, mesh: Mesh, rules: Rules = (), parts: Mapping[str, int] | None = None
) -> Split:
    """The first rules that fit one parameter.

    Args:
      spec: The parameter.
      mesh: The mesh.
      rules: Those of `layout`.
      parts: Into how many parts a logical axis falls that "tensor" may not divide; see `Mixer`.
    """
    parts = parts or {}
    taken: dict[int, str | None] = {}
    for logical, axis in (*rules, *RULES):
        size = mesh.get(axis, 1) if axis is not None else 1
        if axis is not None and (size == 1 or axis in taken.values()):
            continue
        found = [
            i
            for i, (name, length) in enumerate(zip(spec.axes, spec.shape, strict=True))
            if i not in taken
            and (name == logical or (logical == LARGEST and name not in _NEVER))
            and (parts.get(name, length) if axis == "tensor" else length) % size == 0
        ]
        if found:
            taken[max(found, key=lambda i: spec.shape[i])] = axis
    return tuple(taken.get(i) for i in range(len(spec.shape)))


def _parts(config: Config, spec: ParamSpec) -> Mapping[str, int]:
    """Into how many parts the axes of a parameter fall that computation does not divide."""
    first, *rest = spec.path.split(".")
    mixer = config.model.layers[int(rest[0])].mixer if first == "blocks" else None
    return getattr(mixer, "parts", {})


def inherited(split: Split, shape: Sequence[int], like: Sequence[int]) -> Split:
    """The split of an array that belongs to a parameter, such as a moment or a scale.

    Args:
      split: The parameter's.
      shape: The array's shape: the parameter's, with a 1 where it is reduced.
      like: The parameter's shape.
    """
    return tuple(
        axis if size == whole else None
        for axis, size, whole in zip(split, shape, like, strict=True)
    )


def activation_layout(mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """The mesh axes that split each logical axis of an activation; the width is never split."""
    splits = {"batch": BATCH_AXES, "time": ("sequence",)}
    splits |= {logical: (axis,) for logical, axis in RULES if axis == "tensor"}
    return {
        logical: tuple(axis for axis in axes if mesh.get(axis, 1) > 1)
        for logical, axes in splits.items()
    }


def state_layout(config: Config, mesh: Mesh, rows: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The mesh axes that split each axis of a state's arrays, the rows first, by path.

    What the mesh does not divide stays whole.
    """
    axes = activation_layout(mesh)

    def split(logical: str, size: int) -> tuple[str, ...]:
        names = axes.get(logical, ())
        return names if size % math.prod(mesh[name] for name in names) == 0 else ()

    return {
        spec.path: (
            split("batch", rows),
            *(split(*axis) for axis in zip(spec.axes, spec.shape, strict=True)),
        )
        for spec in state_spec(config)
    }


def share(split: Iterable[str | None], mesh: Mesh) -> int:
    """How many parts a split makes."""
    return math.prod(mesh[axis] for axis in split if axis is not None)


def device_values(config: Config, mesh: Mesh, lora: LoraOptions | None = None) -> int:
    """How many values of the parameters, and of the adapters, each device keeps."""
    splits = layout(config, mesh, lora)
    specs = layer_spec(config) + (trainable_specs(config, lora) if lora else ())
    return sum(spec.size // share(splits[spec.path], mesh) for spec in specs)


def require_fit(
    config: Config,
    mesh: Mesh,
    *,
    rows: int | None = None,
    length: int | None = None,
    rules: Rules = (),
) -> None:
    """Raises `ValueError` unless a mesh fits a model and its batches.

    "tensor" must divide the vocabulary, the MLPs, the heads and the blocks of the gates. A mesh
    axis may leave at most 2 % of the values whole. Key heads that "tensor" does not divide are
    whole on every device.

    Args:
      config: The model.
      mesh: The mesh.
      rows: Rows of a batch, if known.
      length: Tokens of a row, if known.
      rules: Those of `layout`.

    Raises:
      ValueError: It does not fit; the message says why, and what would.
    """
    strategy(mesh)
    tensor = mesh.get("tensor", 1)
    counts = _tensor_counts(config)
    if bad := [name for name, count in counts.items() if count % tensor]:
        fitting = _divisors(math.gcd(*counts.values()))
        raise UserError(
            f"tensor={tensor} must divide {' and '.join(bad)}; sizes that fit: {_listed(fitting)}"
        )
    for name in ("fsdp", "sequence", "tensor"):
        whole = _whole(config, mesh, name, rules)
        if whole:
            fitting = [
                size
                for size in range(1, 2 * mesh[name] + 1)
                if not _whole(config, {**mesh, name: size}, name, rules)
            ]
            more = f" and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else ""
            raise UserError(
                f"{name}={mesh[name]} must split all but 2 % of the values, but it does not "
                f"divide {', '.join(whole[:_SHOWN])}{more}; sizes that fit: {_listed(fitting)}"
            )
    splits = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
    if rows is not None and rows % splits:
        raise UserError(
            f"the rows of a batch must be divisible by {' * '.join(BATCH_AXES)} = {splits}, "
            f"got {rows}"
        )
    if length is not None:
        require_length(mesh, length)


def require_length(mesh: Mesh, length: int) -> None:
    """Raises `ValueError` unless a mesh divides the tokens of a row."""
    if length % mesh.get("sequence", 1):
        raise UserError(
            f"the tokens of a row must be divisible by sequence={mesh['sequence']}, got {length}"
        )


def _tensor_counts(config: Config) -> dict[str, int]:
    """What "tensor" must divide, by words for it."""
    model = config.model
    counts = {f"vocab_size {model.vocab_size}": model.vocab_size}
    words = {"heads": "the number of heads", "lru": "the number of gate blocks"}
    for layer in model.layers:
        counts[f"the width of the MLP {layer.mlp}"] = layer.mlp
        counts |= {
            f"{words[axis]} {count}": count
            for axis, count in getattr(layer.mixer, "parts", {}).items()
            if axis in words
        }
    return counts


def _whole(config: Config, mesh: Mesh, axis: str, rules: Rules) -> list[str]:
    """The parameters that a mesh axis leaves whole, if they hold more values than they may."""
    if mesh.get(axis, 1) == 1:
        return []
    splits = _splits(config, tuple(mesh.items()), None, tuple(rules))
    kept = {logical for logical, to in rules if to is None}
    kept |= {"kv"} if axis == "tensor" else set()
    specs = layer_spec(config)
    whole = [s for s in specs if axis not in splits[s.path] and not kept & {*s.axes}]
    if sum(s.size for s in whole) <= _REPLICATED * sum(s.size for s in specs):
        return []
    whole.sort(key=lambda s: -s.size)
    return [f"{s.path} {list(s.shape)}" for s in whole]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(sizes: Sequence[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last
