"""Adds a reward model's ratings to the assistant's turns of conversations.

python -m steerjax.annotate --model DIR --input FILE --output FILE.jsonl [--turns last] [--part I/N]

The output has the input's rows in order, in the conversation format (docs/formats.md). A turn that is rated gets
`predicted_ratings` and `predicted_label`, in place of any that it had; all else stays. An interrupted job goes on where
it was, run again. Turns that do not fit a row are listed in OUTPUT.skipped.jsonl, and have no prediction.

With --part 2/8, for one of eight processes or hosts, the rows go to OUTPUT.part-2-of-8.jsonl. Whoever finishes last
joins the parts: OUTPUT is then what one process would have written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from steerjax.command import add_scoring_options, open_scorer
from steerjax.data.loading import Skipped
from steerjax.errors import ConfigError, DataError, SteerjaxError

if TYPE_CHECKING:
    from steerjax.data.conversation import Conversation
    from steerjax.scoring.scorer import Chunk, Scorer

T = TypeVar("T")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m steerjax.annotate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a run's folder, checkpoints/STEP, a Hugging Face folder, or "
        "a hub id")  # fmt: skip
    add("--input", required=True, metavar="FILE", help="conversations in any format: a file, embedded:... or hub:...")
    add("--output", required=True, metavar="FILE", type=Path, help="a .jsonl file")
    add("--turns", choices=("all", "last"), default="all", help="which of the assistant's turns; default all")
    add("--part", default="1/1", metavar="I/N", help="only the I-th of N parts, from 1")
    add("--chunk-rows", type=int, default=0, metavar="N",
        help="input rows that are packed together, and lost when interrupted; default 128 times --rows")  # fmt: skip
    add_scoring_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        annotate(options)
    except SteerjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def annotate(options: argparse.Namespace) -> None:
    """Annotates the input, or this process's part of it; joins the parts if this was the last.

    Raises:
        SteerjaxError: options, rows or a model that do not fit.
    """
    from steerjax.data.jobs import ResumableOutput
    from steerjax.data.readers import iter_rows

    number, parts = parse_part(options.part)
    if options.chunk_rows < 0:
        raise ConfigError(f"--chunk-rows {options.chunk_rows}; cure: at least 1, or 0 for the default")
    output = part_path(options.output, number, parts)
    total = sum(1 for _ in iter_rows(options.input))
    if not total:
        raise DataError("no row in it", file=options.input, cure="check that this is the file you meant")
    scorer = open_scorer(options.model, options)
    size = options.chunk_rows or 128 * scorer.rows
    settings = job_settings(options, scorer, size)
    chunks = -(-total // size)
    mine = range(chunks * (number - 1) // parts, chunks * number // parts)
    with ResumableOutput(output, settings | {"part": f"{number}/{parts}"}) as file:
        if not file.finished:
            work = Work(options, scorer, size, mine, file.done)
            progress = Progress(max(0, min(total, mine.stop * size) - mine.start * size))
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
    if parts > 1:
        join_parts(options.output, parts, settings)


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
    """The input in chunks of `size` rows, of which `mine` are read and those that are not written yet made ready.

    Attributes:
        usable: rows of the output, once all chunks were read.
    """

    def __init__(self, options: argparse.Namespace, scorer: Scorer, size: int, mine: range, done: int):
        from steerjax.scoring.scorer import reading_schema

        self._options, self._scorer, self._size, self._mine, self._done = options, scorer, size, mine, done
        self._schema = reading_schema(scorer.schema)
        self.usable = 0

    def chunks(self) -> Iterator[Read]:
        from steerjax.data.readers import iter_rows

        rows = islice(iter_rows(self._options.input), self._mine.start * self._size, self._mine.stop * self._size)
        while items := list(islice(rows, self._size)):
            yield self._chunk(items)

    def _chunk(self, items: list[tuple[int, Any]]) -> Read:
        from steerjax.scoring.scorer import assistant_turns

        skip = self._options.on_bad_row == "skip"
        rows, conversations, unusable = [], [], []
        for line, row in items:
            try:
                conversations.append(self._conversation(row, line))
                rows.append(row)
            except DataError as error:
                if not skip:
                    raise error.at(self._options.input, line) from None
                reason = f"field '{error.field}': {error.message}" if error.field else error.message
                unusable.append(Skipped(self._options.input, line, reason))
        turns = [assistant_turns(conversation) for conversation in conversations]
        if self._options.turns == "last":
            turns = [wanted[-1:] for wanted in turns]
        first, self.usable = self.usable, self.usable + len(rows)
        written = bool(rows) and self.usable <= self._done
        ready = None if written else self._scorer.prepare(conversations, turns, skip=skip)
        return Read(len(items), first, rows, conversations, turns, unusable, ready)

    def _conversation(self, row: dict | DataError, line: int) -> Conversation:
        from steerjax.data.formats import conversation_from_row

        if isinstance(row, DataError):
            raise row
        unrated = {self._schema.names[0]: None} | row  # prompt and response alone are enough here
        conversation = conversation_from_row(unrated, self._schema, self._options.format)
        source = self._options.input
        return replace(conversation, file=source, line=line, id=conversation.id or f"{source}:{line}")


def annotated(chunk: Read, scorer: Scorer) -> tuple[list[dict], list[Skipped]]:
    """The output rows of a chunk, and what was left out.

    Raises:
        DataError: a prediction that is not finite.
    """
    from steerjax.scoring.scorer import predicted_keys

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
        from tqdm import tqdm

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


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8).

    Raises:
        ConfigError: anything else.
    """
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"--part {text}; cure: I/N with I from 1 to N, e.g. 2/8")
    return int(number), int(parts)


def part_path(output: Path, number: int, parts: int) -> Path:
    """Where a part is written; OUTPUT where there is one only."""
    return output if parts == 1 else output.with_name(f"{output.stem}.part-{number}-of-{parts}{output.suffix}")


def skipped_path(output: Path) -> Path:
    return output.with_name(output.name + ".skipped.jsonl")


def settings_path(output: Path) -> Path:
    """What `ResumableOutput` calls it."""
    return output.with_name(output.name + ".settings.json")


def job_settings(options: argparse.Namespace, scorer: Scorer, size: int) -> dict:
    """All that the output depends on."""
    from steerjax.data.loading import file_hashes

    o = options
    return {
        "command": "annotate", "source": o.input, "input": file_hashes([o.input])[o.input],
        "model": model_digest(scorer.description.path), "attributes": list(scorer.schema.names), "turns": o.turns,
        "format": o.format, "on_bad_row": o.on_bad_row, "control_strings": o.control_strings, "template": o.template,
        "dtype": o.dtype, "row_length": scorer.row_length, "rows": scorer.rows, "chunk_rows": size,
    }  # fmt: skip


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


if __name__ == "__main__":
    main()
