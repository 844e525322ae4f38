"""Collectives in a compiled program's text: which, how often a step, and how many bytes.

XLA prints an optimised module as computations that call each other. A collective inside a while loop (the scan over
layers, a matrix product that waits for a ring) runs as often as the loop turns. TPU programs hold one collective in
several fusions, with the work that hides it; these pieces share a channel id and are counted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(calls|to_apply|body|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)\}?")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "token": 0}


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: of KINDS.
        shape: dimensions of the largest array that it returns, on one device.
        bytes: of all arrays that it returns, on one device.
        group: devices that take part together.
        times: how often a step runs it.
        exact: false where a loop around it turns a number of times that the text does not tell; `times` then counts
            one turn.
    """

    kind: str
    shape: tuple[int, ...]
    bytes: float
    group: int
    times: int = 1
    exact: bool = True

    @property
    def received(self) -> float:
        """Bytes that a device receives over its links in a step, with the usual ring algorithms."""
        ring = (self.group - 1) / self.group
        factor = {"all-gather": ring, "all-reduce": 2 * ring, "reduce-scatter": self.group - 1, "all-to-all": ring}
        return self.times * self.bytes * factor.get(self.kind, 1.0)


@dataclass
class _Computation:
    collectives: list[tuple[Collective, str]]  # and its channel id, "" without one
    calls: list[tuple[str, int | None, bool]]  # name, turns (None where the text does not tell), is it a fusion


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled module (`compiled.as_text()`), with how often a step runs them.

    Args:
        devices: of the program; a collective without groups is among all.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match[2]] = []
        else:
            lines.append(line)
    parsed = {name: _parse(lines, bodies, devices) for name, lines in bodies.items()}
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()

    def visit(name: str, times: int, exact: bool, fused: bool) -> None:
        for c, channel in parsed[name].collectives:
            if fused and channel:
                if (c.kind, channel) in seen:
                    continue
                seen.add((c.kind, channel))
            if c.group > 1:
                found.append(replace(c, times=times, exact=exact))
        for called, turns, fusion in parsed[name].calls:
            visit(called, times * (turns or 1), exact and turns is not None, fusion)

    visit(entry[1], 1, True, False)
    return found


def shapes(text: str) -> Iterator[tuple[int, ...]]:
    """Dimensions of every array that the text names, on one device."""
    for match in set(_SHAPE.findall(text)):
        yield tuple(int(size) for size in match[1].split(",") if size)


def _parse(lines: list[str], bodies: dict[str, list[str]], devices: int) -> _Computation:
    out = _Computation([], [])
    for line in lines:
        code = line.split(", metadata=")[0]
        if match := _COLLECTIVE.search(code):
            channel = re.search(r"channel_id=(\d+)", line)
            out.collectives.append((_collective(match, code, devices), channel[1] if channel else ""))
        for role, names in _CALLED.findall(line):
            if match and role == "to_apply":  # the addition of a reduction
                continue
            turns = _turns(line, bodies) if role == "body" else 1
            fusion = " fusion(" in code
            out.calls += [(name, turns, fusion) for name in re.findall(r"[\w.-]+", names) if name in bodies]
    return out


def _turns(line: str, bodies: dict[str, list[str]]) -> int | None:
    """Of a while loop: what XLA notes, or of `counter < bound` with a counter that starts at 0 and grows by a constant.

    None where the text says neither.
    """
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(known[1])
    names = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line)
    condition, body = _definitions(bodies[names[1]]), _definitions(bodies[names[2]])
    compare = re.search(r" compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT", condition["ROOT"])
    counter = compare and re.search(r"index=(\d+)", condition[compare[1]])
    bound = compare and _constant(condition[compare[2]])
    if not counter or bound is None:
        return None
    new = re.findall(r"%?([\w.-]+)(?:, |\))", body["ROOT"].split(" tuple(")[-1])[int(counter[1])]
    grown = re.search(r" add\(%?([\w.-]+), %?([\w.-]+)\)", body.get(new, ""))
    by = grown and (_constant(body[grown[2]]) or _constant(body[grown[1]]))
    return -(-bound // by) if by else None


def _definitions(lines: list[str]) -> dict[str, str]:
    """name -> its line, and the last under ROOT."""
    out = {}
    for line in lines:
        if match := re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line):
            out[match[2]] = line
            if match[1]:
                out["ROOT"] = line
    return out


def _constant(line: str) -> int | None:
    match = re.search(r" constant\((\d+)\)", line)
    return int(match[1]) if match else None


def _collective(match: re.Match, code: str, devices: int) -> Collective:
    kind, start = match[1], bool(match[2])
    arrays = [
        (dims, math.prod(dims) * (_BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])) / 8)
        for dtype, dims in ((d, tuple(map(int, s.split(",")))) for d, s in _SHAPE.findall(code[: match.start()]) if s)
    ]
    group = _group(code, devices)
    total = sum(size for _, size in arrays)
    if start:  # the type of an asynchronous start names the operands, too
        parts = {"all-gather": group / (group + 1), "reduce-scatter": 1 / (group + 1), "all-reduce": 1.0}
        total *= parts.get(kind, 0.5)
    shape = max(arrays, key=lambda array: array[1])[0] if arrays else ()
    return Collective(kind, shape, total or 4.0, group)


def _group(code: str, devices: int) -> int:
    """Devices in a group: of `{{0,1},{2,3}}`, `[groups,size]<=[...]` or `mesh['a'=2,'b'=4] {'b'}`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", code):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", code):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", code):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # a part of an axis: 'a':(1)2
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    return devices
