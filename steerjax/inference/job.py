"""What all resumable jobs share: rows in, and an output that the next run goes on with after any interruption."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pydantic
import xxhash
from tqdm import tqdm

from steerjax.checksums import with_own, without_own
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, usable_rows
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.files import cannot_write, write_text
from steerjax.locks import only_writer
from steerjax.typed import STRICT, read_json, typed

WRITTEN = "written"  # key of OUTPUT.settings.json: `Written`


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
    settings: dict[str, Any]
    done: int = 0  # rows that are written
    listed: set[bytes] = field(default_factory=set)  # lines of OUTPUT.skipped.jsonl
    written: dict[str, "_Sum"] = field(default_factory=lambda: {"rows": _Sum(), "skipped": _Sum()})

    def add(self, first: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows from number `first` on, but for those that are there already; on disk when this returns."""
        new = [_line(row) for row in rows[self.done - first :]]
        self._write(self.file, "rows", new)
        self.done += len(new)

    def skip(self, entries: Iterable[Skipped]) -> None:
        """Lists what was left out, once."""
        new = [line for line in dict.fromkeys(_line(asdict(entry)) for entry in entries) if line not in self.listed]
        if new:
            with cannot_write(self.path):
                file = beside(self.path, "skipped.jsonl").open("ab")
            with file:
                self._write(file, "skipped", new)
            self.listed.update(new)

    def record(self) -> None:
        """Writes OUTPUT.settings.json: what the output depends on, and the checksums of what is written."""
        written = {name: one.said() for name, one in self.written.items()}
        write_text(beside(self.path, "settings.json"), json.dumps(self.settings | {WRITTEN: written}, indent=2) + "\n")

    def _write(self, file: IO[bytes], name: str, lines: Sequence[bytes]) -> None:
        _write(file, lines)
        for line in lines:
            self.written[name].add(line)
        self.record()


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Written:
    """Bytes and checksum (XXH3-128) of rows and of what was left out; None in an output of an older steerjax."""

    rows: tuple[int, str] | None
    skipped: tuple[int, str] | None


class _Sum:
    """The checksum of a file that is added to."""

    def __init__(self):
        self._size, self._sum = 0, xxhash.xxh3_128()

    def add(self, content: bytes) -> None:
        self._size += len(content)
        self._sum.update(content)

    def said(self) -> tuple[int, str]:
        return self._size, self._sum.hexdigest()

    def read(self, file: IO[bytes], said: tuple[int, str] | None, whole: bool) -> Iterator[bytes]:
        """The lines of a file, which are `said`; what a killed process wrote behind them is cut off.

        Raises DataError: they are others; or there are more, where the file is `whole`. Then the file stays as it is.
        """
        file.seek(0)
        for line in _first_lines(file, said[0]) if said else file if whole else _whole_lines(file):
            self.add(line)
            yield line
        if said not in (None, self.said()) or (whole and file.read(1)):
            cure = "put it back, or remove it and its settings.json, and start again"
            raise DataError("is not what was written: its checksum differs", file=file.name, cure=cure)
        if said and not whole:
            file.truncate(said[0])


@contextmanager
def resumable(path: Path, settings: Mapping[str, Any]) -> Iterator[Output]:
    """Opens an output, for one process, with what an earlier run has written; `settings` are all that it depends on.

    The lines stand in OUTPUT.partial until the block ends without an error, so a file called OUTPUT is whole.
    Raises DataError: an output that was made with other settings, or was changed since. LockedError: another process
    is writing it. WriteError.
    """
    if path.suffix != ".jsonl":
        raise DataError("lines are added to a plain .jsonl file only", file=str(path), cure="name it .jsonl")
    with only_writer(path):
        finished, partial, listing = path.exists(), beside(path, "partial"), beside(path, "skipped.jsonl")
        if finished and not beside(path, "settings.json").exists():  # it may be the input
            wrong = f"a file that we did not write is there, or {beside(path, 'settings.json')} is gone"
            raise DataError(wrong, file=str(path), cure="name another output")
        with _opened(path if finished else partial, path) as file:
            file.seek(0)
            output = Output(path, finished, file, dict(settings))
            if finished or any(_whole_lines(file)):
                said = _check_settings(path, settings)
                output.done = sum(1 for _ in output.written["rows"].read(file, said.rows, finished))
                if listing.exists() or (said.skipped and said.skipped[0]):
                    with _opened(listing, path) as lines:
                        output.listed.update(output.written["skipped"].read(lines, said.skipped, finished))
            else:
                listing.unlink(missing_ok=True)  # of another job
                output.record()
            yield output
            if not finished:
                with cannot_write(path):
                    partial.rename(path)


def is_finished(path: Path) -> bool:
    """Whether an output is whole, so that nothing is left to do.

    Raises DataError: it was changed since, or its settings.json is gone.
    """
    if not path.exists():
        return False
    cure = "put it back, or remove it and its settings.json, and start again"
    said = read_json(dict[str, Any], beside(path, "settings.json"), DataError, cure)
    written = typed(Written, said.get(WRITTEN), f"{beside(path, 'settings.json')}: {WRITTEN}", DataError)
    with path.open("rb") as file:
        for _ in _Sum().read(file, written.rows, whole=True):
            pass
    return True


@contextmanager
def appended(path: Path) -> Iterator[tuple[list[tuple[int, dict]], Callable[[Mapping[str, Any]], None]]]:
    """For one process: (line, row) of what a file has, in any order, and what adds a row: on disk when it returns.

    Raises DataError: a line that is no JSON object, or not what was written. LockedError: another process is writing
    it. WriteError.
    """
    with only_writer(path), _opened(path, path) as file:
        found = iter_rows(str(path)) if list(_whole_lines(file)) else ()
        rows = [(line, _checked(row, path, line)) for line, row in found]
        yield rows, lambda row: _write(file, [_line(with_own(row))])


def _checked(row: dict | DataError, path: Path, line: int) -> dict:
    try:
        if isinstance(row, DataError):
            raise row
        return without_own(row)
    except ValueError as error:
        raise DataError(str(error), file=str(path), line=line, cure="remove the line, and it is made again") from None


def _opened(file: Path, output: Path) -> IO[bytes]:
    """A file to be read and added to; errors name the output."""
    with cannot_write(output):
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("ab+")


def _check_settings(path: Path, settings: Mapping[str, Any]) -> Written:
    """What is recorded of what is written."""
    cure = "name another output, remove the old one, or run with the settings that it was made with"
    then = read_json(dict[str, Any], beside(path, "settings.json"), DataError, cure)
    where = f"{beside(path, 'settings.json')}: {WRITTEN}"
    written = typed(Written, then.pop(WRITTEN), where, DataError) if WRITTEN in then else Written(None, None)
    now = json.loads(json.dumps(settings))  # which makes lists of tuples
    if differing := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
        key = differing[0]
        values = f"{key}: then {then.get(key)!r}, now {now.get(key)!r}"
        message = f"was made with other settings: {', '.join(differing)} ({values})"
        raise DataError(message, file=str(path), cure=cure)
    return written


def _first_lines(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Those of a file's first bytes."""
    while size > 0 and (line := file.readline(size)):
        size -= len(line)
        yield line


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
