"""Seeded mutations of plain data and of files: what a hostile or broken file may hold in place of a value."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 10**400, 0.0, 0.5, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), "", "(", "\0", "\ud800", "x" * 10_000, "../../etc/passwd", "1", "lasst",
    [], [[]], {}, {"a": 1}, [1], ["("], [None], ["x"] * 3, [10**400],
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value below the root, 50 levels deep."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts if len(path) < 50 else ():
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy, with `change(holder, key)` done to the place."""
    new = copy.deepcopy(value)
    holder = new
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return new


def mutated(value: Any, draw: random.Random, count: int = 1) -> Any:
    """A copy of nested lists and mappings with `count` places mutated: another value, gone, renamed, nested."""
    for _ in range(count):
        known = list(places(value))
        if not known:
            return draw.choice(HOSTILE)
        path, kind, new = draw.choice(known), draw.random(), draw.choice(HOSTILE)

        def change(holder, key, kind=kind, new=new) -> None:
            if kind < 0.7:
                holder[key] = new
            elif kind < 0.85:
                del holder[key]
            elif kind < 0.9 and isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            elif kind < 0.95 and isinstance(holder, dict):
                holder[draw.choice(("", "x", "\0", "a" * 300))] = new
            else:
                for _ in range(draw.choice((3, 200))):
                    new = [new]
                holder[key] = new

        value = changed(value, path, change)
    return value


def mutated_json(value: Any, draw: random.Random) -> bytes:
    """The text of a JSON file: its values mutated, or itself cut, spliced, flipped or replaced."""
    kind = draw.random()
    if kind < 0.75:
        try:
            return json.dumps(mutated(value, draw, draw.choice((1, 1, 1, 2, 5)))).encode()
        except RecursionError:
            return b"[" * 100_000
    text = bytearray(json.dumps(value).encode())
    place = draw.randrange(len(text))
    if kind < 0.82:
        return bytes(text[:place])
    if kind < 0.90:
        text[place] ^= 1 << draw.randrange(8)
        return bytes(text)
    if kind < 0.95:
        text[place:place] = draw.choice((b"\0", b"\xff\xfe", b"NaN", b"1e999", b'"', b"{", b"]", b"9" * 5000))
        return bytes(text)
    return draw.choice((b"", b"[]", b"null", b"3", b'"x"', b"{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b"{" * 100_000,
                        b"\0" * 1000, b'{"a":' * 5000 + b"1" + b"}" * 5000))  # fmt: skip
