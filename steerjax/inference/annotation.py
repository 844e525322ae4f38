"""Annotation as a job: chunks of rows in, the same rows with predicted ratings out, in parts, again after a kill."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tqdm import tqdm

from steerjax.data.conversation import Conversation
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import Skipped
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.files import atomic, json_line, write_atomic
from steerjax.inference.job import ResumableOutput, carried, read_settings, skipped_path, write_settings
from steerjax.schema import Schema

if TYPE_CHECKING:
    from steerjax.inference.scorer import Chunk, Scorer

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The input, and what of it is rated.

    Attributes:
        path: as `iter_rows` takes it.
        format: of its rows.
        schema: of the ratings that it may hold.
        last_turn_only: rate only the last of the assistant's turns.
        skip: leave rows out that cannot be used, and list them, rather than raise.
    """

    path: str
    format: str
    schema: Schema
    last_turn_only: bool
    skip: bool

    def check(self) -> int:
        """Number of rows, after a look at each, so that no bad one is found after hours.

        Raises:
            DataError: the first bad row, or no usable row at all.
        """
        rows, usable, first = 0, 0, "none"
        for rows, (_, row) in enumerate(self.rows(), start=1):
            if not isinstance(row, DataError):
                usable += 1
            elif not self.skip:
                raise _stopping(row)
            elif rows == 1:
                first = f"line {row.line}, {_reason(row)}"
        if not usable:
            cure = "check that this is the file you meant, or name its --format"
            raise DataError(f"no usable row in {rows}; the first: {first}", file=self.path, cure=cure)
        return rows

    def rows(self) -> Iterator[tuple[int, tuple[dict, Conversation] | DataError]]:
        """(line, (what passes through, conversation)) of each row; a row that cannot be used is a DataError."""
        for line, row in iter_rows(self.path):
            try:
                if isinstance(row, DataError):
                    raise row
                yield line, self._row(row, line)
            except DataError as error:
                yield line, error.at(self.path, line)

    def _row(self, row: dict, line: int) -> tuple[dict, Conversation]:
        unrated = {self.schema.names[0]: None} | row  # prompt and response alone are enough here
        read = conversation_from_row(unrated, self.schema, self.format)
        conversation = replace(read, file=self.path, line=line, id=read.id or f"{self.path}:{line}")
        own = "turns" in row and self.format in ("auto", "conversation")
        return carried(row) if own else conversation.to_json(), conversation


class Read(NamedTuple):
    """A chunk of the input: its usable rows (what passes through, conversation), and the bad ones."""

    first: int  # place of the first row in the output
    rows: list[tuple[dict, Conversation]]
    bad: list[DataError]
    ready: Chunk | None  # for the model; None where the rows are written already


def run(source: Source, scorer: Scorer, part: range, output: Path, settings: Mapping[str, Any], size: int) -> None:
    """Writes the rows of a part, with ratings, or what an interrupted run left of them.

    Args:
        part: indices of input rows, read in chunks of `size`.
        settings: all that the rows depend on.

    Raises:
        DataError: a row that cannot be used, a prediction that is not finite, an output of another job.
    """
    with ResumableOutput(output, settings) as file:
        if file.finished:
            print(f"{output} is finished")
        else:
            listing, usable = SkippedList(skipped_path(output), fresh=not file.done), 0
            with tqdm(total=len(part), unit="row", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
                for chunk in ahead(chunks(source, scorer, part, size, file.done)):
                    seen, usable = len(chunk.rows) + len(chunk.bad), usable + len(chunk.rows)
                    if chunk.ready is None:
                        bar.initial += seen  # no part of the speed
                    else:
                        rows, skipped = annotated(chunk, scorer)
                        listing.add(skipped)
                        for place in reversed(range(len(rows))):  # so that they are written at once
                            file.put(chunk.first + place, rows[place])
                    bar.update(seen)
            file.finish(usable)
            print(f"{usable} rows in {output}; {scorer.counts}")
    if skipped_path(output).exists():
        print(f"turns or rows that were left out are listed in {skipped_path(output)}")


def chunks(source: Source, scorer: Scorer, part: range, size: int, done: int) -> Iterator[Read]:
    """The part in chunks; those that are not written yet are made ready."""
    from steerjax.inference.scorer import assistant_turns

    left, first = islice(source.rows(), part.start, part.stop), 0
    while items := [row for _, row in islice(left, size)]:
        bad = [row for row in items if isinstance(row, DataError)]
        if bad and not source.skip:
            raise _stopping(bad[0])
        rows = [row for row in items if not isinstance(row, DataError)]
        ready = None
        if not rows or first + len(rows) > done:
            conversations = [conversation for _, conversation in rows]
            turns = [assistant_turns(conversation) for conversation in conversations]
            wanted = [each[-1:] for each in turns] if source.last_turn_only else turns
            ready = scorer.prepare(conversations, wanted, skip=source.skip)
        yield Read(first, rows, bad, ready)
        first += len(rows)


def annotated(chunk: Read, scorer: Scorer) -> tuple[list[dict], list[Skipped]]:
    """The output rows of a chunk, and what was left out."""
    from steerjax.inference.scorer import predicted_keys

    predicted, refused = scorer.score(chunk.ready), chunk.ready.refused
    rows = [row | {"turns": [dict(turn) for turn in row["turns"]], "id": c.id} for row, c in chunk.rows]
    for place, turn in (*chunk.ready.examples, *((r.conversation, r.turn) for r in refused)):
        for key in ("predicted_ratings", "predicted_label"):
            rows[place]["turns"][turn].pop(key, None)
    places = [(conversation.file, conversation.line) for _, conversation in chunk.rows]
    for (place, turn), values in zip(chunk.ready.examples, predicted, strict=True):
        try:
            rows[place]["turns"][turn] |= predicted_keys(values, scorer.schema)
        except DataError as error:
            raise error.at(*places[place]) from None
    skipped = [Skipped(error.file, error.line, _reason(error)) for error in chunk.bad]
    skipped += [Skipped(*places[r.conversation], r.reason) for r in refused]
    return rows, sorted(skipped, key=lambda entry: entry.line)


class SkippedList:
    """`OUTPUT.skipped.jsonl`, in the order of the input. A chunk that is computed again adds nothing twice.

    Args:
        fresh: no row is written yet, so what is there is of another job.
    """

    def __init__(self, path: Path, fresh: bool):
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() and not fresh else []
        lines = [line for line in lines if line.endswith(b"\n")]  # without a last one that is not whole
        self._known = set(lines)
        if lines:
            write_atomic(path, b"".join(lines))
        else:
            path.unlink(missing_ok=True)

    def add(self, entries: list[Skipped]) -> None:
        """On disk when it returns."""
        new = [line for line in dict.fromkeys(json_line(asdict(e)) for e in entries) if line not in self._known]
        if new:
            self._known.update(new)
            with self._path.open("ab") as file:
                file.write(b"".join(new))
                file.flush()
                os.fsync(file.fileno())


def _reason(error: DataError) -> str:
    return f"field '{error.field}': {error.message}" if error.field else error.message


def _stopping(error: DataError) -> DataError:
    cure = f"{error.cure}; or --on-bad-row skip, which lists such rows, and goes on where a job was"
    return DataError(error.message, file=error.file, line=error.line, field=error.field, cure=cure)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        item = pool.submit(next, items, None)
        while (ready := item.result()) is not None:
            item = pool.submit(next, items, None)
            yield ready


def part_rows(rows: int, size: int, number: int, parts: int) -> range:
    """The rows of part `number` (from 1) of `parts`: whole chunks of `size`."""
    chunks = -(-rows // size)
    return range(chunks * (number - 1) // parts * size, min(rows, chunks * number // parts * size))


def part_path(output: Path, number: int, parts: int) -> Path:
    """Where a part is written; OUTPUT where there is one only."""
    return output if parts == 1 else output.with_name(f"{output.stem}.part-{number}-of-{parts}{output.suffix}")


def model_digest(folder: Path) -> str:
    """Tells models apart: name, size, and a sample of the bytes of every file."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}:".encode())
        with file.open("rb") as handle:
            for place in (0, size // 2, max(0, size - 65536)):
                handle.seek(place)
                digest.update(handle.read(65536))
    return digest.hexdigest()


def join_parts(output: Path, parts: int, settings: dict) -> None:
    """Joins the parts' outputs and lists of what was skipped, once all are there.

    Raises:
        DataError: a part was made with other settings.
    """
    paths = [part_path(output, number, parts) for number in range(1, parts + 1)]
    if missing := [path.name for path in paths if not path.exists()]:
        print(f"not there yet: {', '.join(missing)}")
        return
    for number, path in enumerate(paths, start=1):
        if read_settings(path) != settings | {"part": f"{number}/{parts}"}:
            raise DataError("was made with other settings than this part", file=str(path), cure="make all parts alike")
    if lists := [skipped_path(path) for path in paths if skipped_path(path).exists()]:
        _join(lists, skipped_path(output))
    write_settings(output, settings | {"part": "1/1"})
    _join(paths, output)
    print(f"joined {parts} parts in {output}")


def _join(parts: list[Path], whole: Path) -> None:
    with atomic(whole) as file:
        for path in parts:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
