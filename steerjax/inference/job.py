"""What annotate and generate share: rows in, and an output that the next run goes on with after any interruption."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, usable_rows
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.typed import read_json

_OTHER = "name another output, remove the old one, or run with the settings that it was made with"


@dataclass(frozen=True)
class InputRow:
    """A conversation with its place, what else of the row passes through, and what the model is asked."""

    conversation: Conversation
    carried: dict[str, Any]
    request: Any = None

    def content(self) -> list:
        return self.conversation.content()


def input_rows(
    source: str, read: Callable[[dict, int], InputRow], skipped: list[Skipped], **options: str
) -> Iterator[InputRow]:
    """`read(row, line)` of each row; the rest as `usable_rows`."""

    def rows(source: str) -> Iterator[tuple[int, InputRow | DataError]]:
        for line, row in iter_rows(source):
            try:
                if isinstance(row, DataError):
                    raise row
                yield line, read(row, line)
            except DataError as error:
                yield line, error.at(source, line)

    return usable_rows([source], rows, skipped, **options)


def carried(row: Mapping[str, Any]) -> dict[str, Any]:
    """What passes through, as JSON can carry it: NaN, a table's gap, is null.

    Raises:
        DataError: bytes, an infinite number or the like; names the key.
    """
    out = {}
    for key, value in row.items():
        try:
            out[key] = json.loads(json.dumps(value), parse_constant={"NaN": None}.__getitem__)
        except (TypeError, ValueError, KeyError) as error:
            cure = "remove the key, or write it as a text or a finite number"
            raise DataError(f"JSON cannot carry it: {error}", field=key, cure=cure) from None
    return out


def beside(output: Path, what: str) -> Path:
    """OUTPUT.partial, OUTPUT.settings.json (what it was made with) or OUTPUT.skipped.jsonl (what was left out)."""
    return output.with_name(f"{output.name}.{what}")


def write_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Says what an output is made with, before its first line."""
    beside(output, "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def check_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Raises DataError where an output was made with other settings; names them."""
    then = read_json(dict[str, Any], beside(output, "settings.json"), DataError, _OTHER)
    now = json.loads(json.dumps(settings))  # which makes lists of tuples
    if differing := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        key = differing[0]
        message = f"was made with other settings: {', '.join(differing)} ({key}: then {then.get(key)!r}, "
        raise DataError(f"{message}now {now.get(key)!r})", file=str(output), cure=_OTHER)


@dataclass
class Output:
    """One JSON object a line, in the input's order; `resumable` opens it."""

    path: Path
    finished: bool  # OUTPUT is there already; nothing is left to do
    file: IO[bytes]
    done: int  # rows that are written
    listed: set[bytes]  # lines of OUTPUT.skipped.jsonl
    _waiting: dict[int, bytes] = field(default_factory=dict)

    def put(self, index: int, row: Mapping[str, Any]) -> None:
        """Row `index`, in any order: it is on disk once all before it are. One that was written before is ignored."""
        if index >= self.done:
            self._waiting[index] = _line(row)
        while self.done in self._waiting:
            self.file.write(self._waiting.pop(self.done))
            self.done += 1
        _sync(self.file)

    def skip(self, entries: Iterable[Skipped]) -> None:
        """Lists what was left out; what is listed already is not again."""
        if new := [line for line in dict.fromkeys(_line(asdict(e)) for e in entries) if line not in self.listed]:
            self.listed.update(new)
            with beside(self.path, "skipped.jsonl").open("ab") as file:
                file.writelines(new)
                _sync(file)

    def finish(self, total: int) -> None:
        """Gives the output its name, once all `total` rows are there."""
        if self.done != total or self._waiting:
            raise RuntimeError(f"{self.done} of {total} rows are written")
        if not self.finished:
            beside(self.path, "partial").rename(self.path)


@contextmanager
def resumable(path: Path | str, settings: Mapping[str, Any]) -> Iterator[Output]:
    """Opens an output, for one process, with what an earlier run has written.

    The lines stand in OUTPUT.partial until `Output.finish`, so a file called OUTPUT is whole. `settings` are all that
    the lines depend on, as JSON: options, hash of the input file, model.

    Raises:
        DataError: an output that was made with other settings, or that another process is writing; not writable.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise DataError("lines are added to a plain .jsonl file only", file=str(path), cure="name it .jsonl")
    finished, listing, listed = path.exists(), beside(path, "skipped.jsonl"), set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = (path if finished else beside(path, "partial")).open("ab+")
    except OSError as error:
        raise DataError(f"cannot write: {error}", file=str(path), cure="name a place that is writable") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or name another output"
            raise DataError("another process is writing it", file=str(path), cure=cure) from None
        done = sum(1 for _ in _whole_lines(file))
        if done or finished:
            check_settings(path, settings)
            if listing.exists():
                with listing.open("ab+") as lines:
                    listed.update(_whole_lines(lines))
        else:
            listing.unlink(missing_ok=True)  # of another job
            write_settings(path, settings)
        yield Output(path, finished, file, done, listed)


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file that is added to; what a killed process left of a last one is cut off."""
    file.seek(0)
    for line in file:
        if line.endswith(b"\n"):
            yield line
        else:
            file.truncate(file.tell() - len(line))


def _line(value: Any) -> bytes:
    """A line of JSON; half a surrogate pair as its escape, which UTF-8 cannot carry itself."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
