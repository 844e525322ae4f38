"""What annotate and generate share: rows in, and an output that the next run goes on with after any interruption."""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, usable_rows
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.files import cannot_write, write_text
from steerjax.typed import read_json


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
    """What passes through, as JSON can carry it: NaN, a table's gap, is null. Raises DataError, e.g. for bytes."""
    out = {}
    for key, value in row.items():
        try:
            out[key] = json.loads(json.dumps(value), parse_constant={"NaN": None}.__getitem__)
        except (TypeError, ValueError, KeyError) as error:
            cure = "remove the key, or write it as a text or a finite number"
            raise DataError(f"JSON cannot carry it: {error}", field=key, cure=cure) from None
    return out


def progress(total: int, done: int, unit: str) -> tqdm:
    """A bar with the time that is left; off a terminal it is written every ten seconds."""
    pause = 0.1 if sys.stderr.isatty() else 10
    return tqdm(total=total, initial=done, unit=unit, mininterval=pause)


def beside(output: Path, what: str) -> Path:
    """OUTPUT.partial, OUTPUT.settings.json (what it was made with) or OUTPUT.skipped.jsonl (what was left out)."""
    return output.with_name(f"{output.name}.{what}")


@dataclass
class Output:
    """One JSON object a line; `resumable` opens it."""

    path: Path
    finished: bool  # nothing is left to do
    file: IO[bytes]
    done: int  # rows that are written
    listed: set[bytes]  # lines of OUTPUT.skipped.jsonl

    def add(self, first: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows from number `first` on, but for those that are there already; on disk when this returns."""
        new = [_line(row) for row in rows[self.done - first :]]
        _write(self.file, new)
        self.done += len(new)

    def skip(self, entries: Iterable[Skipped]) -> None:
        """Lists what was left out, once."""
        new = [line for line in dict.fromkeys(_line(asdict(entry)) for entry in entries) if line not in self.listed]
        if new:
            with beside(self.path, "skipped.jsonl").open("ab") as file:
                _write(file, new)
            self.listed.update(new)


@contextmanager
def resumable(path: Path, settings: Mapping[str, Any]) -> Iterator[Output]:
    """Opens an output, for one process, with what an earlier run has written; `settings` are all that it depends on.

    The lines stand in OUTPUT.partial until the block ends without an error, so a file called OUTPUT is whole.
    Raises DataError: an output that was made with other settings, or that another process is writing; not writable.
    """
    if path.suffix != ".jsonl":
        raise DataError("lines are added to a plain .jsonl file only", file=str(path), cure="name it .jsonl")
    finished, partial, listing = path.exists(), beside(path, "partial"), beside(path, "skipped.jsonl")
    if finished and not beside(path, "settings.json").exists():  # it may be the input
        wrong = f"a file that we did not write is there, or {beside(path, 'settings.json')} is gone"
        raise DataError(wrong, file=str(path), cure="name another output")
    with _locked(path if finished else partial, path) as file:
        file.seek(0)
        output = Output(path, finished, file, sum(1 for _ in (file if finished else _whole_lines(file))), set())
        if output.done or finished:
            _check_settings(path, settings)
            if listing.exists():
                with listing.open("ab+") as lines:
                    output.listed.update(_whole_lines(lines))
        else:
            listing.unlink(missing_ok=True)  # of another job
            write_text(beside(path, "settings.json"), json.dumps(settings, indent=2) + "\n")
        yield output
        if not finished:
            partial.rename(path)


@contextmanager
def appended(path: Path) -> Iterator[tuple[list[tuple[int, dict]], Callable[[Mapping[str, Any]], None]]]:
    """For one process: (line, row) of what a file has, in any order, and what adds a row: on disk when it returns.

    Raises DataError: another process is writing it, it is not writable, or a line that is no JSON object.
    """
    with _locked(path, path) as file:
        rows = list(iter_rows(str(path))) if list(_whole_lines(file)) else []
        if broken := [row for _, row in rows if isinstance(row, DataError)]:
            raise broken[0]
        yield rows, lambda row: _write(file, [_line(row)])


@contextmanager
def _locked(file: Path, output: Path) -> Iterator[IO[bytes]]:
    """Opens a file to be read and added to; errors name the output."""
    with cannot_write(output):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("ab+")
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or name another output"
            raise DataError("another process is writing it", file=str(output), cure=cure) from None
        yield opened


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    cure = "name another output, remove the old one, or run with the settings that it was made with"
    then = read_json(dict[str, Any], beside(path, "settings.json"), DataError, cure)
    now = json.loads(json.dumps(settings))  # which makes lists of tuples
    if differing := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        key = differing[0]
        values = f"{key}: then {then.get(key)!r}, now {now.get(key)!r}"
        message = f"was made with other settings: {', '.join(differing)} ({values})"
        raise DataError(message, file=str(path), cure=cure)


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


def _write(file: IO[bytes], lines: Sequence[bytes]) -> None:
    with cannot_write(file.name):
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
