"""Annotation as a job: chunks of rows in, the same rows with predicted ratings out, in parts, again after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from steerjax.data.conversation import Conversation
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import Skipped
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.inference.job import ResumableOutput, settings_path
from steerjax.inference.scorer import Chunk, Scorer, assistant_turns, predicted_keys, reading_schema

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What is annotated.

    Attributes:
        source: the input, as `iter_rows` takes it.
        format: of its rows.
        rows: how many they are.
        chunk_rows: rows that are packed together, and lost when interrupted.
        last_turn_only: rate only the last of the assistant's turns.
        skip: leave rows out that cannot be used, and list them, rather than raise.
    """

    source: str
    format: str
    rows: int
    chunk_rows: int
    last_turn_only: bool
    skip: bool

    def part(self, number: int, parts: int) -> range:
        """The chunks of part `number` (from 1) of `parts`."""
        chunks = -(-self.rows // self.chunk_rows)
        return range(chunks * (number - 1) // parts, chunks * number // parts)


def run(job: Job, scorer: Scorer, chunks: range, output: Path, settings: Mapping[str, Any]) -> None:
    """Writes these chunks' rows, with ratings, or what an interrupted run left of them.

    Args:
        settings: all that the rows depend on.

    Raises:
        DataError: a row that cannot be used, a prediction that is not finite, an output of another job.
    """
    size = job.chunk_rows
    with ResumableOutput(output, settings) as file:
        if not file.finished:
            work = Work(job, scorer, chunks, file.done)
            progress = Progress(max(0, min(job.rows, chunks.stop * size) - chunks.start * size))
            listing = SkippedList(skipped_path(output), fresh=not file.done)
            for chunk in ahead(work.chunks()):
                if chunk.ready is not None:
                    rows, skipped = annotated(chunk, scorer)
                    listing.add(skipped)
                    for place in reversed(range(len(rows))):  # so that they are written at once
                        file.put(chunk.first + place, rows[place])
                progress.update(chunk.size, chunk.ready is not None)
            progress.close()
            file.finish(work.usable)
            print(f"{work.usable} rows in {output}; {scorer.counts}")
        else:
            print(f"{output} is finished")
    if skipped_path(output).exists():
        print(f"turns or rows that were left out are listed in {skipped_path(output)}")


@dataclass(frozen=True)
class Read:
    """A chunk of the input.

    Attributes:
        size: number of its rows.
        first: index of the first row among the output's.
        rows: as they were read, those that can be used.
        conversations, turns: the same, and which turns are rated.
        unusable: the others.
        ready: for the model; None where the rows are written already.
    """

    size: int
    first: int
    rows: list[dict]
    conversations: list[Conversation]
    turns: list[list[int]]
    unusable: list[Skipped]
    ready: Chunk | None


class Work:
    """The input in chunks, of which `mine` are read and those that are not written yet made ready.

    Attributes:
        usable: rows of the output, once all chunks were read.
    """

    def __init__(self, job: Job, scorer: Scorer, mine: range, done: int):
        self._job, self._scorer, self._mine, self._done = job, scorer, mine, done
        self._schema = reading_schema(scorer.schema)
        self.usable = 0

    def chunks(self) -> Iterator[Read]:
        size = self._job.chunk_rows
        rows = islice(iter_rows(self._job.source), self._mine.start * size, self._mine.stop * size)
        while items := list(islice(rows, size)):
            yield self._chunk(items)

    def _chunk(self, items: list[tuple[int, Any]]) -> Read:
        rows, conversations, unusable = [], [], []
        for line, row in items:
            try:
                conversations.append(self._conversation(row, line))
                rows.append(row)
            except DataError as error:
                if not self._job.skip:
                    raise error.at(self._job.source, line) from None
                reason = f"field '{error.field}': {error.message}" if error.field else error.message
                unusable.append(Skipped(self._job.source, line, reason))
        turns = [assistant_turns(conversation) for conversation in conversations]
        if self._job.last_turn_only:
            turns = [wanted[-1:] for wanted in turns]
        first, self.usable = self.usable, self.usable + len(rows)
        written = bool(rows) and self.usable <= self._done
        ready = None if written else self._scorer.prepare(conversations, turns, skip=self._job.skip)
        return Read(len(items), first, rows, conversations, turns, unusable, ready)

    def _conversation(self, row: dict | DataError, line: int) -> Conversation:
        if isinstance(row, DataError):
            raise row
        unrated = {self._schema.names[0]: None} | row  # prompt and response alone are enough here
        conversation = conversation_from_row(unrated, self._schema, self._job.format)
        source = self._job.source
        return replace(conversation, file=source, line=line, id=conversation.id or f"{source}:{line}")


def annotated(chunk: Read, scorer: Scorer) -> tuple[list[dict], list[Skipped]]:
    """The output rows of a chunk, and what was left out.

    Raises:
        DataError: a prediction that is not finite.
    """
    predicted = scorer.score(chunk.ready)
    rows = []
    for row, conversation, turns in zip(chunk.rows, chunk.conversations, chunk.turns, strict=True):
        out = dict(row) if "turns" in row else conversation.to_json()
        out["turns"] = [dict(turn) for turn in out["turns"]]
        for turn in turns:
            out["turns"][turn].pop("predicted_ratings", None)
            out["turns"][turn].pop("predicted_label", None)
        rows.append(out | {"id": conversation.id})
    for (place, turn), values in zip(chunk.ready.examples, predicted, strict=True):
        try:
            rows[place]["turns"][turn] |= predicted_keys(values, scorer.schema)
        except DataError as error:
            raise error.at(chunk.conversations[place].file, chunk.conversations[place].line) from None
    places = [(chunk.conversations[refused.conversation], refused.reason) for refused in chunk.ready.refused]
    skipped = chunk.unusable + [Skipped(c.file, c.line, reason) for c, reason in places]
    return rows, sorted(skipped, key=lambda entry: entry.line)


class SkippedList:
    """`OUTPUT.skipped.jsonl`, in the order of the input. A chunk that is computed again adds nothing twice.

    Args:
        fresh: no row is written yet, so what is there is of another job.
    """

    def __init__(self, path: Path, fresh: bool):
        self._path = path
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() and not fresh else []
        self._known = set(lines)  # without a last line that is not whole
        if lines:
            replace_file(path, b"".join(line + b"\n" for line in lines))
        else:
            path.unlink(missing_ok=True)

    def add(self, entries: list[Skipped]) -> None:
        """On disk when it returns."""
        lines = [json.dumps(asdict(entry), ensure_ascii=False).encode() for entry in entries]
        new = [line for line in dict.fromkeys(lines) if line not in self._known]
        if new:
            self._known.update(new)
            with self._path.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in new))
                file.flush()
                os.fsync(file.fileno())


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        item = pool.submit(next, items, None)
        while (ready := item.result()) is not None:
            item = pool.submit(next, items, None)
            yield ready


class Progress:
    """Rows a second and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total, unit="row", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._total, self._seen, self._computed = total, 0, 0
        self._start = self._said = time.monotonic()

    def update(self, rows: int, computed: bool) -> None:
        """`computed`: not read only, because an earlier run had written them."""
        self._seen += rows
        self._computed += rows * computed
        self._bar.update(rows)
        now = time.monotonic()
        if self._bar.disable and computed and (now - self._said > 10 or self._seen == self._total):
            self._said = now
            rate = self._computed / (now - self._start)
            left = (self._total - self._seen) / rate
            print(f"{self._seen}/{self._total} rows, {rate:.1f} rows/s, {left / 60:.1f} min left", flush=True)

    def close(self) -> None:
        self._bar.close()


def part_path(output: Path, number: int, parts: int) -> Path:
    """Where a part is written; OUTPUT where there is one only."""
    return output if parts == 1 else output.with_name(f"{output.stem}.part-{number}-of-{parts}{output.suffix}")


def skipped_path(output: Path) -> Path:
    return output.with_name(output.name + ".skipped.jsonl")


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
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        print(f"not there yet: {', '.join(missing)}")
        return
    for number, path in enumerate(paths, start=1):
        if json.loads(settings_path(path).read_text()) != settings | {"part": f"{number}/{parts}"}:
            raise DataError("was made with other settings than this part", file=str(path), cure="make all parts alike")
    lists = [skipped_path(path).read_bytes() for path in paths if skipped_path(path).exists()]
    if lists:
        replace_file(skipped_path(output), b"".join(lists))
    replace_file(settings_path(output), json.dumps(settings | {"part": "1/1"}, indent=2).encode())
    joined = output.with_name(f"{output.name}.joining-{os.getpid()}")
    with joined.open("wb") as file:
        for path in paths:
            with path.open("rb") as part:
                while block := part.read(1 << 20):
                    file.write(block)
    joined.replace(output)
    print(f"joined {parts} parts in {output}")


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file under another name and renames it."""
    temporary = path.with_name(f"{path.name}.new-{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
