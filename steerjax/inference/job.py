"""A JSONL output that a long job writes line by line, and that the next run goes on with after any interruption."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerjax.errors import DataError
from steerjax.files import json_line, sync_folder, write_atomic
from steerjax.typed import read_json

_OTHER = "name another output, remove the old one, or run with the settings that it was made with"


def settings_path(output: Path) -> Path:
    """Where it stands what a `ResumableOutput` was made with."""
    return output.with_name(output.name + ".settings.json")


def skipped_path(output: Path) -> Path:
    """Where rows and turns that were left out are listed."""
    return output.with_name(output.name + ".skipped.jsonl")


def read_settings(output: Path) -> dict[str, Any]:
    """What an output was made with.

    Raises:
        DataError: the file is missing or no JSON object.
    """
    return read_json(dict[str, Any], settings_path(output), DataError, _OTHER)


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """The inverse of `read_settings`."""
    write_atomic(settings_path(output), json.dumps(settings, indent=2) + "\n")


def carried(value: Any, key: str = "") -> Any:
    """A value of a row that is passed through, as JSON can carry it: NaN, a table's gap, is null.

    Raises:
        DataError: bytes, an infinite number or the like; names the key.
    """
    if isinstance(value, Mapping):
        return {name: carried(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [carried(inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    cure = "remove the key, or write it as a text or a finite number"
    raise DataError(f"JSON cannot carry {value!r:.40}", field=key, cure=cure)


class ResumableOutput:
    """One JSON object a line, one for each input row, in the input's order. A context manager, for one process.

    The lines stand in `OUTPUT.partial`, and `OUTPUT.settings.json` says what they were made with. `finish` gives the
    file its name, so a file called OUTPUT is whole. After a kill at any moment the next run finds the lines that were
    written, less a last one that is not whole.

    Attributes:
        done: rows that are written; the next is input row `done` (from 0).
        finished: OUTPUT is there already, made with these settings; nothing is left to do.

    Args:
        path: OUTPUT; a plain `.jsonl`.
        settings: everything that the lines depend on, as JSON: options, hash of the input file, model.

    Raises:
        DataError: an output that was made with other settings, or that another process is writing; not writable.
    """

    def __init__(self, path: Path | str, settings: Mapping[str, Any]):
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._settings = json.loads(json.dumps(settings))  # as they will be read back: tuples are lists
        self._waiting: dict[int, Mapping] = {}
        self._file = None
        self.finished, self.done = False, 0
        if self.path.suffix != ".jsonl":
            raise DataError("lines are added to a plain .jsonl file only", file=str(path), cure="name it .jsonl")
        try:
            if self.path.exists():
                self._check_settings(self.path)
                with self.path.open("rb") as file:
                    self.finished, self.done = True, sum(1 for _ in file)
            else:
                self._open()
        except (OSError, DataError) as error:
            self.__exit__()  # a notebook keeps the error, and the error this object, and this object the lock
            if isinstance(error, DataError):
                raise
            raise DataError(f"cannot write: {error}", file=str(path), cure="name a place that is writable") from None

    def put(self, index: int, row: Mapping[str, Any]) -> None:
        """The output of input row `index`. It is on disk once all rows before it are; any order of calls will do.

        A row that was written before (computed again as part of a batch) is ignored.
        """
        if index < self.done:
            return
        self._waiting[index] = row
        lines = []
        while self.done in self._waiting:
            lines.append(json_line(self._waiting.pop(self.done)))
            self.done += 1
        if lines:
            self._file.write(b"".join(lines))
            self._sync()

    def finish(self, total: int) -> None:
        """Gives the output its name, once all `total` rows are there."""
        if self.done != total or self._waiting:
            raise RuntimeError(f"{self.done} of {total} rows are written")
        if not self.finished:
            self._partial.rename(self.path)
            sync_folder(self.path.parent)
            self.finished = True

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or name another output"
            raise DataError("another process is writing it", file=str(self.path), cure=cure) from None
        if self._file.seek(0, os.SEEK_END):
            self._check_settings(self._partial)
            self._repair()
        else:
            write_settings(self.path, self._settings)

    def _check_settings(self, file: Path) -> None:
        then, now = read_settings(self.path), self._settings
        differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        if differing:
            key = differing[0]
            message = f"was made with other settings: {', '.join(differing)} ({key}: then {then.get(key)!r}, "
            raise DataError(f"{message}now {now.get(key)!r})", file=str(file), cure=_OTHER)

    def _repair(self) -> None:
        """Counts the whole lines and cuts off what a killed process left of the next one."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n") or not _is_object(line):
                break
            end += len(line)
            self.done += 1
        if self._file.read():  # more lines after a broken one: no interruption leaves that
            cure = "remove it, and run again from the start"
            raise DataError("broken line", file=str(self._partial), line=self.done + 1, cure=cure)
        self._file.truncate(end)
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
