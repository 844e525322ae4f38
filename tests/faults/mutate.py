"""Sound values, bytes and texts made odd, a few changes at a time; the same for the same state of `random`."""

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any

DEEP: Any = 1
for _ in range(200):
    DEEP = [DEEP]

VALUES = (
    None, True, False, 0, -1, 1, 5, 0.5, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 10**30, 10**400, "",
    " ", "\n", "x", "4", "nan", "\0", "\ud83d", "\udc00x", "\ufeff", "\u2028", "é" * 1000, [], [None], [[]], ["a", 1],
    [10**400], [float("nan")], {}, {"": ""}, {"\ud800": 1}, {"value": []}, {"name": ["a"], "value": []}, DEEP,
)  # fmt: skip
KEYS = ("", "id", "role", "content", "ratings", "turns", "system", "label", "text", "\ud800", "\0", "a.b", "name", "é")
BYTES = (
    b"", b"\0", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"\\", b"{",
    b"}", b"[", b"]", b",", b":", b"\t", b"null", b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"[" * 3000,
    b'{"a":' * 3000, b"\\ud800", b"\x1f\x8b", b"PAR1", b"sep=;\n", b" " * 1000,
)  # fmt: skip


def mutated_json(value: Any, random: Random, changes: int = 2) -> Any:
    """A copy of plain data, with up to so many of its parts replaced, left out, renamed, wrapped, repeated or moved."""
    holder = [copy.deepcopy(value)]
    for _ in range(random.randint(1, changes)):
        places = list(_places(holder))
        parent, key = random.choice(places)
        kind = random.randrange(8)
        if kind < 3:
            parent[key] = copy.deepcopy(random.choice(VALUES))
        elif kind == 3 and parent is not holder:
            del parent[key]
        elif kind == 4 and isinstance(parent, dict):
            parent[random.choice(KEYS)] = parent.pop(key)
        elif kind == 5:
            parent[key] = [parent[key]] if random.random() < 0.5 else {random.choice(KEYS): parent[key]}
        elif kind == 6 and isinstance(parent, list) and parent is not holder:
            parent += [copy.deepcopy(parent[key])] * random.choice((1, 1, 50))
        else:
            other, place = random.choice(places)
            if kind == 7 and isinstance(parent[key], str):
                parent[key] = mutated_text(parent[key], random, ())
            else:
                parent[key] = copy.deepcopy(other[place])
    return holder[0]


def _places(parent: Any):
    for key in list(parent) if isinstance(parent, dict) else range(min(len(parent), 100)):
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from _places(parent[key])


def mutated_text(text: str, random: Random, pieces: Sequence[str]) -> str:
    """`text` with characters left out, repeated, replaced or put in; `pieces` are put in as well."""
    odd = "\0\x07\u200b\u200d\u2060\u00ad\ufeff\u0301\u2581 \n\t\ud800\U0001f600\uff1c\uff5c<>|[]_"
    for _ in range(random.randint(1, 4)):
        place = random.randint(0, len(text))
        put = random.choice(pieces) if pieces and random.random() < 0.5 else random.choice(odd)
        text = text[:place] + put + text[place + random.choice((0, 0, 1, 3)) :]
    return text


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """`data` with bytes flipped, cut off, left out, repeated or put in."""
    for _ in range(random.randint(1, 3)):
        place, kind = random.randint(0, len(data)), random.randrange(6)
        if kind == 0 and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + data[place + random.randint(1, 20) :]
        elif kind == 3:
            data = data[:place] + data[place : place + 200] * random.choice((2, 50)) + data[place:]
        else:
            data = data[:place] + random.choice(BYTES) + data[place:]
    return data


def odd_json(value: Any) -> bytes:
    """`value` as JSON's reader takes it in Python: NaN, half surrogate pairs as escapes."""
    return json.dumps(value).encode()
