"""Files and folders that are whole or not there: how everything is written that is not added to line by line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from steerjax.errors import WriteError, machine_refusal
from steerjax.signals import cleans_up

_NAME_BYTES = 255 - len(".") - len(".partial-") - 20  # of a name that a file system takes, with ours around it


@contextlib.contextmanager
def cannot_write(path: str | os.PathLike, *also: type[Exception]) -> Iterator[None]:
    """Raises WriteError for an OSError of the block, or one of `also`: the path, the reason, and a cure."""
    try:
        yield
    except (OSError, *also) as error:
        number = getattr(error, "errno", None)
        reason, cure = machine_refusal(error) or (
            os.strerror(number) if number else str(error), "a place that can be written and has room",
        )  # fmt: skip
        named = getattr(error, "filename", None)
        where = f" ({os.fsdecode(named)})" if named and os.fspath(path) not in os.fsdecode(named) else ""
        raise WriteError(f"'{path}' cannot be written: {reason}{where}\n  cure: {cure}") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: str = "w", **options: Any) -> Iterator[IO]:
    """A file to write that takes its name, on disk, when the block ends well; else what was there stays as it is.

    `mode` is "w" (UTF-8) or "wb"; `options` are those of `open`. Folders above are made. A device or a pipe is written
    as it is. Raises WriteError.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    options = options if "b" in mode else {"encoding": "utf-8", "newline": ""} | options
    with cannot_write(path), cleans_up():
        if target.exists() and not target.is_file() and not target.is_dir():
            with target.open(mode, **options) as file:
                yield file
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial = _partial(target)
        try:
            with open(partial, mode.replace("w", "x"), **options) as file:
                _own(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, *also: type[Exception]) -> Iterator[Path]:
    """A folder beside `path` that takes its place, on disk, when the block ends well; else what was there stays.

    Raises WriteError: as `cannot_write`.
    """
    target = Path(os.path.realpath(path))
    with cannot_write(path, *also), cleans_up():
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial = _partial(target)
        before = partial.with_name(partial.name + "-old")
        partial.mkdir()
        own = os.open(partial, os.O_RDONLY)
        try:
            _own(own)
            yield partial
            sync(partial)
            if target.exists():
                os.rename(target, before)
            os.rename(partial, target)
            _sync(target.parent)
        finally:
            os.close(own)
            if before.exists() and not target.exists():
                os.rename(before, target)
            for left in (partial, before):
                shutil.rmtree(left, ignore_errors=True)


def sync(folder: Path) -> None:
    """Returns when all that it holds is on disk, so that no loss of power leaves a half under the name that it gets."""
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        _sync(path)


def make_folder(path: str | os.PathLike) -> None:
    """The folder, with those above it, where there is none. Raises WriteError."""
    with cannot_write(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_text(path: str | os.PathLike, text: str, **options: Any) -> None:
    """`whole_file` with this text."""
    with whole_file(path, "w", **options) as file:
        file.write(text)


def copy_file(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """`whole_file` with another's content."""
    with open(source, "rb") as old, whole_file(path, "wb") as new:
        shutil.copyfileobj(old, new)


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)[:_NAME_BYTES]
    return f".{os.fsdecode(name)}.partial-"


def _partial(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{os.getpid()}")


def _own(descriptor: int) -> None:
    """Says that the writer lives: the system frees the lock with it."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(target: Path) -> None:
    """What killed processes left of the same target. One that lives holds its lock, on whichever machine."""
    for entry in os.scandir(target.parent):
        number = entry.name.removeprefix(_prefix(target)).removesuffix("-old")
        if not entry.name.startswith(_prefix(target)) or not number.isdecimal() or lives(int(number)):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            finally:
                os.close(descriptor)


def lives(process: int) -> bool:
    """Whether another process of this machine has the number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _sync(path: Path) -> None:
    """Its content, or a folder's list of names, is on disk."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not all take a folder's
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
