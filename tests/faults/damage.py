"""Damage to files, seeded: what a disk, a copy that was cut off, or a hand does to them."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

# Damage -> what it does to a file of at least one byte.
DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {}


def _damage(function):
    DAMAGES[function.__name__] = function
    return function


@_damage
def flip(path: Path, draw: random.Random) -> None:
    """One bit of the file is another."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@_damage
def truncate(path: Path, draw: random.Random) -> None:
    """The file ends early."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


@_damage
def empty(path: Path, draw: random.Random) -> None:
    """The file has its name and nothing else."""
    path.write_bytes(b"")


@_damage
def delete(path: Path, draw: random.Random) -> None:
    """The file is gone."""
    path.unlink()


def damage(path: Path, kind: str, seed: int) -> None:
    """Damages a file in the way `kind`, a key of DAMAGES; the same seed does the same."""
    DAMAGES[kind](path, random.Random(f"{seed}/{kind}/{path.name}"))


def damageable(folder: Path, leave: tuple[str, ...] = ()) -> list[Path]:
    """Every file below a folder that has a byte, in order, without names in `leave`."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in leave)


def cases(folder: Path, seed: int, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, str, int]]:
    """(file relative to the folder, kind, seed) of every file and kind."""
    for number, path in enumerate(damageable(folder, leave)):
        for kind in DAMAGES:
            yield path.relative_to(folder).as_posix(), kind, seed + number
