"""A compiled program as its HLO text tells it: its instructions, and its collectives, counted.

A program is a set of computations that call each other: loops, branches and fusions. A collective inside a loop counts
as often as the loop runs. The trip count is `known_trip_count` in the text, or the constant that the loop's counter is
compared with. A loop with neither raises ValueError. Of the branches of a conditional, the one that sends most counts.

The TPU compiler may split a collective into a start, steps that are fused with arithmetic, and an end. They count as
one: its parts inside fusions share channel, chips and shape.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}

_HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation)=%([\w.-]+)")


@dataclass(frozen=True)
class Collective:
    """kind: one of KINDS. size: bytes of the larger of operand and result on one chip. group: chips that take part.

    times: how often it runs in the program.
    """

    kind: str
    size: int
    group: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes a chip sends in all, on a ring: the least that any algorithm can do with."""
        if self.kind == "collective-permute":
            return self.times * self.size
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.size * (self.group - 1) / self.group


class Instruction(NamedTuple):
    """A line of a computation: what stands before `=`, the shape, the operation, and what follows its bracket."""

    name: str
    shape: str
    op: str
    rest: str


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a program on `devices` chips, with the number of times each runs."""
    computations, entry = parse_program(text)
    found: dict[str, list[Collective]] = {}

    def inside(name: str) -> list[Collective]:
        """Those of a computation and of all it calls; parts of one collective once."""
        if name not in found:
            mine: dict[str, list[Collective]] = {}
            _walk(name, mine, fused=False)
            found[name] = [one for parts in mine.values() for one in parts]
        return found[name]

    def _walk(name: str, mine: dict[str, list[Collective]], fused: bool) -> None:
        for line in computations[name]:
            kind = line.op.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # every chip keeps its part of the sum
                kind = "reduce-scatter"
            if kind in KINDS:
                one = _collective(kind, line, devices)
                channel = re.search(r"channel_id=(\d+)", line.rest)
                part = f"{channel[1]} {one}" if fused and channel else f"{name} {line.name}"
                mine[part] = [one]
            elif line.op == "while":
                body = re.search(r"body=%([\w.-]+)", line.rest)[1]
                times = _trips(line, computations) if inside(body) else 1
                mine[f"{name} {line.name}"] = [
                    Collective(c.kind, c.size, c.group, c.times * times) for c in inside(body)
                ]
            elif line.op == "conditional":
                branches = [inside(branch) for branch in _branches(line.rest)]
                mine[f"{name} {line.name}"] = max(branches, key=lambda b: sum(c.sent for c in b))
            elif line.op in ("fusion", "call", "async-start"):
                for called in _CALLED.findall(line.rest) or re.findall(r"to_apply=%([\w.-]+)", line.rest):
                    _walk(called, mine, fused=line.op == "fusion")

    return inside(entry)


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"count": how many run, "bytes": what a chip sends}}, largest first."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0.0})
    for one in found:
        totals[one.kind]["count"] += one.times
        totals[one.kind]["bytes"] += one.sent
    return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))


def largest_stack(text: str, layers: int) -> int:
    """Bytes of the program's largest array whose first axis is the layers.

    An axis of `layers` or `layers - 1` (a predictor has no part for the first layer) counts. Vectors are left out.
    """
    sizes = [
        size_of(f"{kind}[{dims}]")
        for kind, dims in set(_SHAPE.findall(text))
        if dims.count(",") > 1 and dims.split(",")[0] in (str(layers), str(layers - 1))
    ]
    return max(sizes, default=0)


def size_of(shape: str) -> int:
    """Bytes of a shape in HLO's notation; for a tuple, those of its largest part."""
    sizes = []
    for kind, dims in _SHAPE.findall(shape):
        bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return max(sizes, default=0)


def parse_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    name, entry = None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (found := _LINE.match(line)):
            shape, rest = _split(found[2])
            op, _, rest = rest.partition("(")
            computations[name].append(Instruction(found[1], shape, op.strip(), rest))
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """The shape at the beginning of an instruction, and the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :]
    raise ValueError(f"no end of the shape in {text[:80]!r}")


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return re.findall(r"%([\w.-]+)", listed[1]) if listed else _CALLED.findall(rest)


def _collective(kind: str, line: Instruction, devices: int) -> Collective:
    group = _group(line.rest, devices)
    # A start's tuple holds operands beside results, but for a sum, whose operands look the same.
    both = line.op.endswith("-start") and kind != "all-reduce"
    size = size_of(line.shape) if both else sum(map(size_of, _parts(line.shape)))
    if line.op == "reduce-scatter":  # its operand is the larger one
        size *= group
    return Collective(kind, size, group)


def _parts(shape: str) -> list[str]:
    """A tuple's arrays; a collective may carry several."""
    return [f"{kind}[{dims}]" for kind, dims in _SHAPE.findall(shape)]


def _group(rest: str, devices: int) -> int:
    """Chips of a group: {{0,1},{2,3}}, [groups,size]<=[...], or mesh['x'=2,'y'=4] {'y'}."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(listed[1])
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return written[1].count(",") + 1
    return devices


def _trips(line: Instruction, computations: dict[str, list[Instruction]]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest):
        return int(known[1])
    condition = computations[re.search(r"condition=%([\w.-]+)", line.rest)[1]]
    constants = [re.match(r"(\d+)\)", one.rest) for one in condition if one.op == "constant"]
    counted = [one for one in condition if one.op == "compare" and "direction=LT" in one.rest]
    if len(constants) == 1 and constants[0] and len(counted) == 1:
        return int(constants[0][1])
    raise ValueError(f"how often the loop {line.name} runs is not in the program's text")
