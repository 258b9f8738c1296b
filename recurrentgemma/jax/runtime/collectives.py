"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_Computation = dict[str, tuple[str, str, str]]  # by name: result, operation, and the rest
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_NUMBER = re.compile(r"(\d+)\)")
_OPERAND = re.compile(r"%([\w.-]+)")
_INDEX = re.compile(r"index=(\d+)")
# A TPU runs parts of one collective in several fusions, one after another.
_CHAIN = re.compile(r"channel_id=\d+(?=.*chain_id=)")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
# The three ways in which groups of devices are written: lists, a shape, axes of a mesh.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_AXES = re.compile(r"replica_groups=@?mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


class Collective(NamedTuple):
    """One operation that sends.

    Attributes:
      kind: One of `KINDS`.
      shapes: The shapes of its results.
      sent: Bytes that one device sends each time, where devices pass parts around a ring.
      times: How often it runs.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sent: int
    times: int


def collectives(program: str) -> list[Collective]:
    """The operations that send in the text of a compiled program, loops counted."""
    found: list[Collective] = []
    chains: set[str] = set()
    bodies, entry = _computations(program)

    def trips(rest: str) -> int:
        """How often a loop runs: as noted, or else the number that its condition compares with."""
        if known := _TRIPS.search(rest):
            return int(known[1])
        loop = _LOOP.search(rest)
        assert loop is not None
        condition, body = bodies[loop[1]], bodies[loop[2]]
        compared = max(_constants(condition).values(), default=1)
        return -(-compared // _step(condition, body))

    def visit(name: str, times: int) -> None:
        for result, operation, rest in bodies.get(name, {}).values():
            kind, chain = operation.removesuffix("-start"), _CHAIN.search(rest)
            is_new = chain is None or chain[0] not in chains
            if kind in KINDS and is_new:
                chains.update([chain[0]] if chain else [])
                scatters = name.startswith("all-reduce-scatter")  # the form that TPUs have
                found.append(_collective(kind, result, rest, times, kind != operation, scatters))
            repeated = trips(rest) if operation == "while" else 1
            for called in _called(rest):
                visit(called, times * repeated)

    visit(entry, 1)
    return found


def sent_bytes(program: str) -> dict[str, int]:
    """Bytes that one device sends in a program, by kind of collective."""
    total: Counter[str] = Counter()
    for each in collectives(program):
        total[each.kind] += each.sent * each.times
    return dict(total)


def _computations(program: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the first."""
    bodies: dict[str, _Computation] = {}
    entry = name = ""
    for line in program.splitlines():
        if begins := _COMPUTATION.match(line):
            name = begins[2]
            bodies[name] = {}
            entry = name if begins[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            bodies[name][found[1]] = (found[2], found[3], found[4])
    return bodies, entry


def _named(computation: _Computation, operation: str) -> dict[str, str]:
    """The instructions of one operation: what follows its name, by the instruction's."""
    return {name: rest for name, (_, found, rest) in computation.items() if found == operation}


def _constants(computation: _Computation) -> dict[str, int]:
    found = {name: _NUMBER.match(rest) for name, rest in _named(computation, "constant").items()}
    return {name: int(number[1]) for name, number in found.items() if number}


def _step(condition: _Computation, body: _Computation) -> int:
    """What a loop's body adds to the number that the condition reads; 1 where it does not show.

    A TPU's compiler makes one run of two where a product meets an exchange.
    """
    read = [_INDEX.search(rest) for rest in _named(condition, "get-tuple-element").values()]
    results = [_OPERAND.findall(rest) for rest in _named(body, "tuple").values()]
    added, constants = _named(body, "add"), _constants(body)
    for place in filter(None, read if results else ()):
        for name in _OPERAND.findall(added.get(results[-1][int(place[1])], "")):
            if name in constants:
                return constants[name]
    return 1


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _collective(
    kind: str, result: str, rest: str, times: int, starts: bool, scatters: bool
) -> Collective:
    arrays = [
        (dtype, tuple(map(int, filter(None, sizes.split(",")))))
        for dtype, sizes in _ARRAY.findall(result)
    ]
    if starts and kind in ("all-gather", "collective-permute"):  # its operands come first
        arrays = [array for array in arrays if array[1] or kind == "all-gather"]
        arrays = arrays[len(arrays) // 2 :]
    size = sum(_bytes(dtype) * math.prod(shape) for dtype, shape in arrays)
    devices = _group(rest)
    others = devices - 1
    if scatters and kind == "all-reduce":
        sent = size * others // devices
        return Collective("reduce-scatter", tuple(shape for _, shape in arrays), sent, times)
    sent = {
        "all-gather": size * others // devices,
        "reduce-scatter": size * others,
        "all-reduce": 2 * size * others // devices,
        "collective-permute": size,
        "all-to-all": size * others // devices,
    }[kind]
    return Collective(kind, tuple(shape for _, shape in arrays), sent, times)


def _group(rest: str) -> int:
    """How many devices exchange what they have."""
    if found := _LISTED.search(rest):
        return len(found[1].split(","))
    if found := _COUNTED.search(rest):
        return int(found[1])
    if found := _AXES.search(rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(size or sizes[name]) for name, size in parts)
    return 1


def _bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
