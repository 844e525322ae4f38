"""Checksums of what is written, against damage (XXH3-128, as fast as memory); provenance has SHA-256, against exchange.

A listed folder holds `checksums.json`: size and checksum of each of its files. A line of a file that is added to has
its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import xxhash

from steerjax.errors import SteerjaxError
from steerjax.typed import STRICT, typed

LIST = "checksums.json"
OWN = "xxh3"  # key of a line's checksum
SMALL = 1 << 20  # bytes of a file that is read at once, even where only sizes are compared
_BLOCK = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Listing:
    """What a folder's list says: file -> bytes, checksum."""

    files: dict[str, tuple[int, str]]


def checksum(path: Path) -> tuple[int, str]:
    """Bytes of a file and their checksum, hex."""
    found, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
            size += count
    return size, found.hexdigest()


def checksums(folder: Path, leave: Collection[str] = ()) -> dict[str, tuple[int, str]]:
    """Of each file below a folder, by its path in it; but for its list, and those in `leave`."""
    names = [name for name in _names(folder) if name not in leave]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(folder / name), names), strict=True))


def write_list(folder: Path, leave: Collection[str] = ()) -> None:
    """Lists a folder that gets its name when it is whole."""
    (folder / LIST).write_text(_text(checksums(folder, leave)), encoding="utf-8")


def what_is_wrong(
    folder: Path, *, read: str | tuple[()] = "", share: tuple[int, int] = (0, 1), foreign: bool = True
) -> str:
    """How a listed folder differs from its list, "" where it does not.

    Files whose names begin with `read` (with (), none) are read, and those of at most SMALL bytes; of others the size
    is compared. `share`: the part of process i of n of the reading. `foreign`: a file that is not listed is wrong;
    names with a dot ahead are not.
    """
    try:
        text = (folder / LIST).read_text(encoding="utf-8")
        listed = typed(Listing, json.loads(text), LIST, SteerjaxError).files
        sizes = {name: (folder / name).stat().st_size for name in _names(folder)}
    except (OSError, ValueError, RecursionError, SteerjaxError) as error:
        return f"{LIST} cannot be read ({error})".replace("\n", " ")
    if text != _text(listed):
        return f"{LIST} is damaged"
    said = [f"{name} is missing" for name in listed.keys() - sizes.keys()]
    said += [
        f"{name} has {sizes[name]} bytes, not {size}"
        for name, (size, _) in listed.items()
        if sizes.get(name, size) != size
    ]
    said += [f"{name} is foreign" for name in sizes.keys() - listed.keys() if foreign and not name.startswith(".")]
    if not said:
        due = sorted((-size, name) for name, (size, _) in listed.items() if size <= SMALL or name.startswith(read))
        mine = [name for _, name in due[share[0] :: share[1]]]
        with ThreadPoolExecutor(_THREADS) as pool:
            said = list(filter(None, pool.map(lambda name: _differs(folder / name, name, listed[name]), mine)))
    return some(said)


def with_own(row: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum in it."""
    return {**row, OWN: xxhash.xxh3_64_hexdigest(json.dumps(row).encode())}


def without_own(row: dict[str, Any]) -> dict[str, Any]:
    """What `with_own` was given; of one that has no checksum, all. Raises ValueError: it is another one's."""
    bare = {key: value for key, value in row.items() if key != OWN}
    if OWN in row and row != with_own(bare):
        raise ValueError("it does not have its checksum")
    return bare


def folder_checksum(folder: Path) -> str:
    """Tells folders apart: of a listed one its list's, whose files are not read again; of another that of all its files
    but for names with a dot ahead, in which downloads keep their times.
    """
    if (folder / LIST).is_file():
        return checksum(folder / LIST)[1]
    hidden = [name for name in _names(folder) if name.startswith(".") or "/." in name]
    return xxhash.xxh3_128_hexdigest(_text(checksums(folder, leave=hidden)).encode())


def some(said: Iterable[str]) -> str:
    """The first three, and how many more there are."""
    said = sorted(said)
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")


def _differs(path: Path, name: str, listed: tuple[int, str]) -> str:
    try:
        return "" if checksum(path) == listed else f"{name} does not have its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / LIST)


def _text(files: dict[str, tuple[int, str]]) -> str:
    return json.dumps({"files": {name: [*files[name]] for name in sorted(files)}}, indent=0) + "\n"
