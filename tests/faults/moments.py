"""Each moment of a command at which a kill finds its files in another state: before whatever Python does to one.

What C++ writes (arrays) lies between two of them, so that the second finds it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PASSING = re.compile(r"(partial-|\.tfevents\.|/metrics\.)\d[\w.-]*")  # names with a process or a time


def install(folder: str, log: str | None, moment: str | None) -> None:
    """Writes the moments that change the folder to the log, a line each, or kills this process at one of them."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if log else None

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES and not (event == "open" and arguments[2] & WRITES):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor
            return
        path = os.fsdecode(path)
        inside = event == "os.remove" and arguments[-1] != -1  # of a folder that is being removed
        if not inside and (not f"{path}/".startswith(f"{folder}/") or "/compile_cache" in path):
            return
        name = "in a folder" if inside else PASSING.sub(lambda found: found[1], path.removeprefix(folder))
        what = f"{event} {name}"
        with lock:
            counts[what] += 1
            now = f"{what} #{counts[what]}"
            if now == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if said is not None:
                os.write(said, f"{now}\n".encode())

    sys.addaudithook(hook)


def kinds(log: Path) -> dict[str, list[str]]:
    """The moments of a log, those of different steps, rows and temporary names under one kind."""
    found: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        found.setdefault(re.sub(r"\d+", "N", line), []).append(line)
    return found
