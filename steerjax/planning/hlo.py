"""What a compiled program's text says of its work: matrix products, memory traffic and collectives of a step.

XLA prints an optimised module as computations that call each other. What is inside a while loop (the scan over layers,
a matrix product that waits for a ring) runs as often as the loop turns; XLA's own `cost_analysis` counts it once. TPU
programs hold one collective in several fusions, with the work that hides it; these pieces share a channel id and are
counted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(calls|to_apply|body|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)\}?")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_PARAMETER = re.compile(r"\s*%?([\w.-]+) = .* parameter\((\d+)\)")
# They move nothing, or name what others move.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


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


@dataclass(frozen=True)
class Work:
    """Of one device in a step.

    Attributes:
        flops: of matrix products, 2 a multiplication and addition; kernels (`custom-call`) are not among them.
        recomputed: the part of them that remat computes again.
        bytes: that instructions read from and write to the device's memory, by the shapes of what they take and give.
        exact: false where a loop turns a number of times that the text does not tell; it is counted once.
    """

    flops: float
    recomputed: float
    bytes: float
    collectives: list[Collective]
    exact: bool


@dataclass
class _Computation:
    collectives: list[tuple[Collective, str]]  # and its channel id, "" without one
    flops: float = 0.0
    recomputed: float = 0.0
    bytes: float = 0.0
    # of others: name, turns (None where the text does not tell), is it a fusion
    calls: list[tuple[str, int | None, bool]] = field(default_factory=list)


def work(text: str, devices: int) -> Work:
    """What a compiled module (`compiled.as_text()`) does.

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
    total = [0.0, 0.0, 0.0]
    all_exact = True
    seen: set[tuple[str, str]] = set()

    def visit(name: str, times: int, exact: bool, fused: bool) -> None:
        nonlocal all_exact
        all_exact &= exact
        one = parsed[name]
        for i, number in enumerate((one.flops, one.recomputed, 0.0 if fused else one.bytes)):
            total[i] += times * number
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
    return Work(*total, found, all_exact)


def _parse(lines: list[str], bodies: dict[str, list[str]], devices: int) -> _Computation:
    out, types = _Computation([]), _types(lines)
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
        if flops := _flops(code, types):
            out.flops += flops
            out.recomputed += flops * ("rematted_computation" in line)
        out.bytes += _traffic(code, types, bodies)
    return out


def _types(lines: list[str]) -> dict[str, str]:
    """name -> the text of its type."""
    found = (_INSTRUCTION.match(line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _dimensions(type: str) -> list[int]:
    return [int(size) for size in _SHAPE.search(type)[2].split(",") if size]


def _flops(code: str, types: dict[str, str]) -> float:
    """Of a `dot`, or of a `convolution`, which is what a TPU makes of matrix products; 0 of anything else."""
    match = _INSTRUCTION.match(code)
    if not match or match[3] not in ("dot", "convolution"):
        return 0.0
    output, (left, right) = _dimensions(match[2]), (_dimensions(types[name]) for name in _operands(match)[:2])
    if match[3] == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", code)[1]
        return 2.0 * math.prod(output) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    of_left, of_right, of_output = re.split("_|->", re.search(r"dim_labels=([\w>-]+)", code)[1])
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{(.*?)\}", code) or ("", ""))[1]))

    def of_window(key: str, place: int, default: str) -> list[int]:
        return [int(n) for n in window[key].split("x")[place].split("_")] if key in window else [int(default)]

    flops = 2.0 * right[of_right.index("i")] * output[of_output.index("b")] * output[of_output.index("f")]
    for place in range(len(of_right) - 2):  # pairs of places that meet within the padded, dilated input
        size, kernel, out = (x[labels.index(str(place))] for x, labels in
                             ((left, of_left), (right, of_right), (output, of_output)))  # fmt: skip
        stride, spread, apart = (of_window(key, place, "1")[0] for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = of_window("pad", place, "0")[0]
        at = [o * stride + k * apart - low for o in range(out) for k in range(kernel)]
        flops *= sum(0 <= i <= (size - 1) * spread and i % spread == 0 for i in at)
    return flops


def _operands(match: re.Match) -> list[str]:
    return re.findall(r"%([\w.-]+)", match[4].split("), ")[0])


def _size(type: str) -> float:
    """Bytes of a type's arrays that lie in the device's main memory: no space S(n) of its own."""
    arrays = re.findall(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?", type)
    return sum(
        _bytes(dtype, (int(n) for n in dims.split(",") if n)) for dtype, dims, layout in arrays if "S(" not in layout
    )


def _bytes(dtype: str, dimensions: Iterable[int]) -> float:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(dimensions) * bits / 8


def _traffic(code: str, types: dict[str, str], bodies: dict[str, list[str]]) -> float:
    """Bytes that an instruction reads and writes; of an array that a slice is taken of, or put into, the slice's."""
    match = _INSTRUCTION.match(code)
    if not match or match[3] in _FREE or match[3].endswith("-done") or "AllocateBuffer" in code:
        return 0.0
    name, operands = match[3], [types.get(operand, "") for operand in _operands(match)]
    if name == "copy-start":  # its type names what is written and what is read
        return _size(match[2])
    if name == "slice-start":
        return 2 * _size(match[2]) - 2 * sum(map(_size, operands))
    if name in ("dynamic-slice", "slice", "gather"):
        return 2 * _size(match[2])
    if name == "dynamic-update-slice":
        return 2 * _size(operands[1])
    sizes, written = list(map(_size, operands)), _size(match[2])
    called = re.search(r"calls=%?([\w.-]+)", code) if name == "fusion" else None
    inner = bodies.get(called[1], []) if called else []
    numbers = {found[1]: int(found[2]) for line in inner if (found := _PARAMETER.match(line))}
    inner_types, sliced = _types(inner), {}
    for line in inner:
        part = _INSTRUCTION.match(line)
        if part and part[3] in ("dynamic-slice", "dynamic-update-slice"):
            array, *others = _operands(part)
            number = numbers.get(array)
            if number is None or not sizes[number]:
                continue
            read = _size(part[2]) if part[3] == "dynamic-slice" else 0.0
            sliced[number] = sliced.get(number, 0.0) + read
            if part[3] == "dynamic-update-slice":  # into an array that stays where it is
                written += _size(inner_types[others[0]]) - sizes[number]
    return sum(sliced.get(number, size) for number, size in enumerate(sizes)) + max(written, 0.0)


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
        (dims, _bytes(dtype, dims))
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
