"""What `steerjax annotate` does: chunks of rows in, the same rows with predicted ratings out, in parts."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from steerjax.bundle import describe
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import Skipped, file_hashes
from steerjax.data.readers import source_format
from steerjax.errors import DataError
from steerjax.inference.job import InputRow, beside, carried, check_settings, input_rows, resumable, write_settings
from steerjax.inference.scorer import Chunk, Scorer, assistant_turns, model_schema, predicted_keys, reading_schema


def annotate(options: argparse.Namespace, number: int, parts: int, open_scorer: Callable[[], Scorer]) -> None:
    """Looks at all rows, so that no bad one is found after hours, then rates part `number` (from 1) of `parts`.

    Raises:
        SteerjaxError: options, rows or a model that do not fit.
    """
    o, skipped = options, []
    schema = reading_schema(model_schema(describe(o.model, template=o.template)))

    def read(row: dict, line: int) -> InputRow:
        conversation = conversation_from_row(row, schema, source_format(o.input, o.format), rated=False)
        conversation = replace(conversation, file=o.input, line=line, id=conversation.id or f"{o.input}:{line}")
        own = "turns" in row and o.format in ("auto", "conversation")
        return InputRow(conversation, carried(row) if own else conversation.to_json())

    total = sum(1 for _ in input_rows(o.input, read, skipped, on_bad_row=o.on_bad_row))
    scorer = open_scorer()
    size = o.chunk_rows or 128 * scorer.rows
    settings = {
        "command": "annotate", "source": o.input, "input": file_hashes([o.input])[o.input], "chunk_rows": size,
        "model": model_digest(scorer.description.path), "attributes": scorer.schema.to_json(),
        "row_length": scorer.row_length, "rows": scorer.rows,
        **{key: vars(o)[key] for key in ("turns", "format", "template", "dtype")},
    }  # fmt: skip
    chunks = -(-total // size)
    part = range(chunks * (number - 1) // parts * size, min(total, chunks * number // parts * size))
    output = part_path(o.output, number, parts)
    with resumable(output, settings | {"part": f"{number}/{parts}"}) as file:
        if file.finished:
            print(f"{output} is finished")
        else:
            file.skip(skipped if number == 1 else ())
            begin = file.done // size * size
            left = islice(input_rows(o.input, read, [], on_bad_row=o.on_bad_row), part.start + begin, part.stop)
            pause = 0.1 if sys.stderr.isatty() else 10
            with tqdm(total=len(part), initial=begin, unit="row", mininterval=pause) as bar:
                for rows, chunk in _ahead(_chunks(left, size, scorer, o.turns == "last", o.on_bad_row == "skip")):
                    annotated = _annotated(rows, chunk, scorer)
                    file.skip(Skipped(*refused[2:]) for refused in chunk.refused)
                    for place, row in enumerate(annotated, start=bar.n):
                        file.put(place, row)
                    bar.update(len(rows))
            file.finish(len(part))
            print(f"{len(part)} rows in {output}; {scorer.counts}")
        if file.listed:
            print(f"turns or rows that were left out are listed in {beside(output, 'skipped.jsonl')}")
    if parts > 1:
        _join(o.output, parts, settings)


def _chunks(left: Iterator[InputRow], size: int, scorer: Scorer, last: bool, skip: bool) -> Iterator[tuple]:
    while rows := list(islice(left, size)):
        conversations = [row.conversation for row in rows]
        turns = [assistant_turns(conversation)[-1 if last else 0 :] for conversation in conversations]
        yield rows, scorer.prepare(conversations, turns, skip=skip)


def _ahead(items: Iterator[tuple]) -> Iterator[tuple]:
    """The items, each made while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        item = pool.submit(next, items, None)
        while (ready := item.result()) is not None:
            item = pool.submit(next, items, None)
            yield ready


def _annotated(rows: Sequence[InputRow], chunk: Chunk, scorer: Scorer) -> list[dict]:
    """The output rows of a chunk."""
    new = {refused[:2]: {} for refused in chunk.refused}
    for (place, turn), values in zip(chunk.examples, scorer.score(chunk), strict=True):
        try:
            new[place, turn] = predicted_keys(values, scorer.schema)
        except DataError as error:
            raise error.at(rows[place].conversation.file, rows[place].conversation.line) from None
    out = [row.carried | {"turns": [dict(t) for t in row.carried["turns"]], "id": row.conversation.id} for row in rows]
    for (place, turn), keys in new.items():
        old = out[place]["turns"][turn]
        out[place]["turns"][turn] = {k: old[k] for k in old if k not in ("predicted_ratings", "predicted_label")} | keys
    return out


def part_path(output: Path, number: int, parts: int) -> Path:
    """Where a part is written; OUTPUT where there is one only."""
    return output if parts == 1 else output.with_name(f"{output.stem}.part-{number}-of-{parts}{output.suffix}")


def model_digest(folder: Path) -> str:
    """Tells models apart: the name, size, and a sample of the bytes of every file."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}:".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - 65536)):
                file.seek(place)
                digest.update(file.read(65536))
    return digest.hexdigest()


def _join(output: Path, parts: int, settings: dict) -> None:
    """Joins the parts' outputs and lists of what was skipped, once all are there and made alike."""
    paths = [part_path(output, number, parts) for number in range(1, parts + 1)]
    if missing := [path.name for path in paths if not path.exists()]:
        print(f"not there yet: {', '.join(missing)}")
        return
    for number, path in enumerate(paths, start=1):
        check_settings(path, settings | {"part": f"{number}/{parts}"})
    write_settings(output, settings | {"part": "1/1"})
    lists = [path for path in (beside(path, "skipped.jsonl") for path in paths) if path.exists()]
    for whole, pieces in ((beside(output, "skipped.jsonl"), lists), (output, paths)):
        if pieces:
            partial = beside(whole, uuid.uuid4().hex)  # another process may be joining too
            with partial.open("wb") as file:
                for piece in pieces:
                    with piece.open("rb") as read:
                        shutil.copyfileobj(read, file)
            partial.replace(whole)
    print(f"joined {parts} parts in {output}")
