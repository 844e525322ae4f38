"""One writer at a time: a lock that the system frees with the process that holds it, and words about who that is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from steerjax.errors import LockedError
from steerjax.files import cannot_write, lives


@contextlib.contextmanager
def only_writer(output: Path, lock: Path | None = None) -> Iterator[None]:
    """While it lasts no other process writes `output`, a file or a folder; `lock` is a file, by default one beside it.

    Raises LockedError: another does; names its process and machine. Where a file system has no locks, what stands in
    the file decides, which a killed process of another machine leaves behind; that is said.
    """
    lock = lock or output.with_name(f".{output.name}.lock")
    with cannot_write(output):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with _held(lock, output) as file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


@contextlib.contextmanager
def _held(lock: Path, output: Path) -> Iterator[IO[str]]:
    held = False
    while not held:
        with cannot_write(output):
            file = lock.open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                cure = "wait until it has ended, or name another place"
                raise LockedError(f"'{output}': {_owner(file)} writes it\n  cure: {cure}") from None
            except OSError:
                _ask_owner(file, lock, output)
            with contextlib.suppress(FileNotFoundError):  # an owner that is done removes it; the next makes a new one
                held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            if held:
                yield file


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"


def _ask_owner(file: IO[str], lock: Path, output: Path) -> None:
    """On a file system without locks. Raises LockedError: an owner that is not known to be dead."""
    print(f"'{output}': no locks on its file system, so that two machines may write it", file=sys.stderr)
    file.seek(0)
    found = re.fullmatch(r"process (\d+) on (.*)", file.read())
    if found and (found[2] != socket.gethostname() or lives(int(found[1]))):
        cure = f"wait until it has ended; if it was killed, delete '{lock}'"
        raise LockedError(f"'{output}': {found[0]} writes it\n  cure: {cure}")
