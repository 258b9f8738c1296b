"""How a format stores parameters: a table of names and axes, and that table for one model."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import ConfigError, MismatchError
from recurrentgemma.common.io.arrays import DTYPES, Stacked, dtype_name
from recurrentgemma.common.io.shards import Tensors, num_bytes
from recurrentgemma.common.model.layer_spec import ParamSpec, mismatches
from recurrentgemma.common.quantization import Quantized
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names.storage import OURS, Storage

Array = np.ndarray | Stacked
Sizes = Callable[[int | None], Mapping[str, int]]
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


class Rule(NamedTuple):
    """Parameters and the tensors that hold them.

    A parameter may be in several rules of a table: a file follows one of them, and the first that
    the shapes allow is written.

    One parameter is one tensor; or several, of which number i holds parameter[i]; or several
    parameters follow one another along the first axis of one tensor.

    Attributes:
      ours: Paths in the layer spec, with "*" for the number of a block.
      theirs: Names of tensors, with "*" for the same number.
      axes: Axes of ours and of theirs: "d (n h) -> n d h" splits the second axis into n and h, and
        moves n to the front. "1" is an axis of one. Empty where both have the same axes.
      add: The tensor holds the parameter plus this number.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    axes: str = ""
    add: float = 0.0


class Piece(NamedTuple):
    """What a parameter and a stored tensor share.

    Attributes:
      path: The parameter.
      part: `parameter[part]` is shared; all of it if None.
      name: The stored tensor.
      rows: `tensor[rows]` is shared; all of it if None.
      split: The parameter's shape (or its part's), with split axes.
      order: The order in which the tensor has these axes.
      shape: The tensor's shape (or its rows').
      add: The tensor holds this much more.
    """

    path: str
    part: int | None
    name: str
    rows: slice | None
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    add: float = 0.0

    def encode(self, parameter: Array) -> Array:
        """The tensor (or its rows) from the parameter; a view, unless a number is added."""
        value = parameter if self.part is None else parameter[self.part]
        if self.order != tuple(range(len(self.order))):
            value = np.asarray(value).reshape(self.split).transpose(self.order)
        value = value.reshape(self.shape)
        return np.asarray(value) + value.dtype.type(self.add) if self.add else value

    def decode(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter, which has this shape, or its part: the inverse of `encode`."""
        value = tensor if self.rows is None else tensor[self.rows]
        value = value - value.dtype.type(self.add) if self.add else value
        value = value.reshape([self.split[axis] for axis in self.order])
        value = value.transpose(np.argsort(self.order))
        return value.reshape(shape if self.part is None else shape[1:])

    @property
    def in_rows(self) -> bool:
        """Whether the last axis of the tensor is the first of the parameter or part, whole."""
        return not self.add and self.order[-1] == 0 and self.split[0] == self.shape[-1]

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of outputs, [N, C], in the parameter's order, from an array in the tensor's.

        The array has C columns in the place of the inputs, which are `in_rows`.
        """
        columns = rows.shape[-1]
        piece = self._replace(part=None, split=(columns, *self.split[1:]))
        return np.ascontiguousarray(piece.decode(rows, (columns, -1)).swapaxes(0, 1))


class Entry(NamedTuple):
    """Parameters that are stored together, and where."""

    specs: tuple[ParamSpec, ...]
    pieces: tuple[Piece, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each stored tensor, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces:
            before = found.get(piece.name, (0,))[0]
            found[piece.name] = (before + piece.shape[0], *piece.shape[1:])
        return found

    @property
    def fits(self) -> bool:
        """Whether the pieces of each tensor differ along its first axis alone."""
        return len({(piece.name, piece.shape[1:]) for piece in self.pieces}) == len(self.shapes)

    def found(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """How many of the tensors are stored with their shapes, and how many by their names."""
        alike = sum(stored.get(name) == shape for name, shape in self.shapes.items())
        return alike, sum(name in stored for name in self.shapes)


class Layout:
    """How a format stores the parameters of one model.

    Attributes:
      specs: The parameters.
      entries: Where they are, in the order in which they are written.
      pieces: Where each parameter is, by path.
      shapes: The shape of each stored tensor, by name, in the order in which they are written.
      storage: How quantised matrices are stored.
    """

    def __init__(
        self, specs: Sequence[ParamSpec], entries: Sequence[Entry], storage: Storage = OURS
    ) -> None:
        self.specs, self.entries, self.storage = specs, entries, storage
        self.pieces: dict[str, list[Piece]] = {spec.path: [] for spec in specs}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for entry in entries:
            self.shapes |= entry.shapes
            for piece in entry.pieces:
                self.pieces[piece.path].append(piece)

    def encode(self, read: Callable[[ParamSpec], Array | Quantized]) -> Iterator[tuple[str, Array]]:
        """The stored tensors, by name; `read` gives each parameter in the Flax layout, once.

        A `Quantized` becomes the tensors of `storage`.
        """
        for entry in self.entries:
            parameters: dict[str, Any] = {}
            for spec in entry.specs:
                value = parameters[spec.path] = read(spec)
                if not isinstance(value, Quantized):
                    continue
                for piece in self.pieces[spec.path]:
                    whole = piece.part is None
                    part = value if whole else value.with_parts(operator.itemgetter(piece.part))
                    for name, array in self.storage.encode(part).items():
                        yield piece.name + name, array
            if any(isinstance(value, Quantized) for value in parameters.values()):
                continue
            for name, pieces in itertools.groupby(entry.pieces, lambda piece: piece.name):
                parts = [piece.encode(parameters[piece.path]) for piece in pieces]
                yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, spec: ParamSpec, fetch: Callable[[str], np.ndarray]) -> Array:
        """A parameter in the Flax layout; `fetch` gives stored tensors."""
        pieces = self.pieces[spec.path]
        parts = [piece.decode(fetch(piece.name), spec.shape) for piece in pieces]
        return parts[0] if pieces[0].part is None else Stacked(parts)

    def in_rows(self, spec: ParamSpec) -> bool:
        """Whether a matrix, or each of a stack, is stored as rows of outputs in any order."""
        pieces = self.pieces[spec.path]
        axes = len(spec.shape) - (pieces[0].part is not None)
        return axes == 2 and all(piece.in_rows for piece in pieces)

    def decode_rows(
        self, spec: ParamSpec, fetch: Callable[[str], Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """The parts of a quantised matrix or stack that is stored `in_rows`.

        Args:
          spec: The parameter.
          fetch: Gives such parts of a stored tensor: each has columns of its own in the place of
            the inputs.
        """
        pieces = self.pieces[spec.path]
        found = [[piece.decode_rows(part) for part in fetch(piece.name)] for piece in pieces]
        if pieces[0].part is None:
            return found[0]
        return [np.stack(parts) for parts in zip(*found, strict=True)]

    def tensors(self, dtypes: Mapping[str, np.dtype], scheme: str | None = None) -> Tensors:
        """Shape and dtype of each stored tensor, from the dtype of each parameter.

        Args:
          dtypes: The dtypes, by path.
          scheme: The scheme in which matrices are stored, if they are quantised.

        Raises:
          ValueError: The scheme does not fit a matrix.
          MismatchError: Parameters that share a tensor have several dtypes.
        """
        found: dict[str, list[np.dtype]] = {name: [] for name in self.shapes}
        for piece in itertools.chain.from_iterable(self.pieces.values()):
            found[piece.name].append(dtypes[piece.path])
        several = [name for name, held in found.items() if len(set(held)) > 1]
        if several:
            raise MismatchError("parameters that share a tensor must have one dtype", several)
        tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        quantized: dict[str, Tensors] = {}
        for spec in self.specs:
            quantized |= self.quantized_tensors(spec, scheme)
        for name, shape in self.shapes.items():
            tensors |= quantized.get(name) or {name: (shape, found[name][0])}
        return tensors

    def scheme_for(self, spec: ParamSpec, scheme: str | None) -> str | None:
        """The scheme in which the format holds a parameter of a model of a scheme, if any."""
        return self.storage.scheme_for(spec, self.pieces[spec.path], scheme)

    def quantized_tensors(self, spec: ParamSpec, scheme: str | None) -> dict[str, Tensors]:
        """The tensors in the place of each tensor of a parameter that the format quantises."""
        held = self.scheme_for(spec, scheme)
        return {
            piece.name: {
                piece.name + part: tensor
                for part, tensor in self.storage.shapes(spec, piece, held).items()
            }
            for piece in self.pieces[spec.path]
            if held is not None
        }

    def stored_bytes(self, spec: ParamSpec, size: int, scheme: str | None) -> int:
        """Bytes of a parameter in a model of a scheme, or of so many bytes a value without one."""
        quantized = self.quantized_tensors(spec, scheme).values()
        return sum(map(num_bytes, quantized)) if quantized else size * spec.size

    def dtypes(
        self, path: object, tensors: Mapping[str, Tensor], problems: Sequence[str] = ()
    ) -> dict[str, np.dtype]:
        """The dtype of each parameter, by path, once the tensors are found to match.

        Args:
          path: Where the tensors are, or go.
          tensors: The tensors that there are, by name.
          problems: What else is wrong with them.

        Raises:
          MismatchError: They are not; it lists all differences.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        supported = ", ".join(DTYPES)
        listed = mismatches(self.shapes, shapes)
        listed += [
            f"{name} must be of a dtype among {supported}"
            for name, tensor in tensors.items()
            if name in self.shapes and dtype_name(tensor.dtype) not in DTYPES
        ]
        dtypes = {
            path: [t.dtype for piece in pieces if (t := tensors.get(piece.name))]
            for path, pieces in self.pieces.items()
        }
        listed += [
            f"{path} must have one dtype in all its parts"
            for path, found in dtypes.items()
            if len(set(found)) > 1
        ]
        if listed := [*listed, *problems]:
            raise MismatchError(f"{path}: the tensors do not match the config", listed)
        return {path: found[0] for path, found in dtypes.items() if found[0] is not None}


def lay_out(
    specs: Sequence[ParamSpec],
    rules: Sequence[Rule],
    format_: Format,
    sizes: Sizes,
    stored: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    storage: Storage = OURS,
) -> Layout:
    """A table, made out for the parameters of a model.

    Args:
      specs: The parameters.
      rules: The table.
      format_: The format, for messages.
      sizes: The sizes of axes that rules split, by letter, for the number of a block.
      stored: The shapes of the tensors that there are, which choose among rules.
      storage: How quantised matrices are stored.

    Raises:
      ConfigError: The table has no names for some of the parameters; all are named.
    """
    known: dict[str, list[Rule]] = {}
    for rule in rules:
        for path in rule.ours:
            known.setdefault(path, []).append(rule)
    by_path = {spec.path: spec for spec in specs}
    entries, nameless = [], []
    for spec in specs:
        block = _BLOCK.match(spec.path)
        number = block[1] if block else ""
        split, ways = sizes(int(number) if number else None), list[Entry]()
        for rule in known.get(_BLOCK.sub("blocks.*.", spec.path), ()):
            paths = [path.replace("*", number) for path in rule.ours]
            if by_path.keys() >= set(paths):
                together = tuple(by_path[path] for path in paths)
                names = tuple(name.replace("*", number) for name in rule.theirs)
                ways.append(Entry(together, tuple(_pieces(together, names, rule, split))))
        ways = [way for way in ways if way.fits]
        if not ways:
            nameless.append(spec.path)
            continue
        way = max(ways, key=lambda way: way.found(stored))  # the first of the best
        if way.specs[0] == spec:
            entries.append(way)
    if nameless:
        raise ConfigError(f"{format_} has no names for {', '.join(nameless)}")
    return Layout(specs, entries, storage)


def _pieces(
    specs: Sequence[ParamSpec], names: Sequence[str], rule: Rule, sizes: Mapping[str, int]
) -> Iterator[Piece]:
    if len(names) > 1:
        (spec,) = specs
        assert len(names) == spec.shape[0]
        for part, name in enumerate(names):
            turn = _turn(rule.axes, spec.shape[1:], sizes)
            yield Piece(spec.path, part, name, None, *turn, rule.add)
        return
    start = 0
    for spec in specs:
        split, order, shape = _turn(rule.axes, spec.shape, sizes)
        rows = slice(start, start + shape[0]) if len(specs) > 1 else None
        yield Piece(spec.path, None, names[0], rows, split, order, shape, rule.add)
        start += shape[0]


def _turn(
    axes: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The split shape, the order and the stored shape that "d (n h) -> n d h" means."""
    if not axes:
        return shape, tuple(range(len(shape))), shape
    ours, theirs = map(_groups, axes.split("->"))
    found: dict[str, int] = {}
    for group, size in zip(ours, shape, strict=True):
        known = {letter: sizes[letter] for letter in group if letter in sizes and len(group) > 1}
        rest = size // math.prod(known.values())
        found |= {letter: known.get(letter, rest) for letter in group}
    letters = list(found)
    order = tuple(letters.index(letter) for group in theirs for letter in group)
    stored = tuple(math.prod(found[letter] for letter in group) for group in theirs)
    return tuple(found.values()), order, stored


def _groups(side: str) -> list[list[str]]:
    """The letters of each axis; an axis of one has none."""
    found = re.findall(r"\(([^)]*)\)|(\S+)", side)
    return [[letter for letter in (many or one).split() if letter != "1"] for many, one in found]
