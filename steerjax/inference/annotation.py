"""What `steerjax annotate` does: chunks of rows in, the same rows with predicted ratings out."""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from steerjax.checksums import folder_checksum
from steerjax.command import describe_model
from steerjax.data.formats import conversation_from_row
from steerjax.data.loading import file_hashes
from steerjax.data.readers import source_format
from steerjax.errors import DataError
from steerjax.inference.job import InputRow, beside, carried, input_rows, progress, resumable
from steerjax.inference.scorer import (
    Chunk,
    Scorer,
    assistant_turns,
    model_schema,
    open_scorer,
    predicted_keys,
    reading_schema,
)


def annotate(options: argparse.Namespace, number: int, parts: int) -> None:
    """Looks at all rows, so that no bad one is found after hours, then rates part `number` (from 1) of `parts`."""
    o, skipped = options, []
    about = describe_model(o.model, o)
    schema = reading_schema(model_schema(about))

    def read(row: dict, line: int) -> InputRow:
        conversation = conversation_from_row(row, schema, source_format(o.input, o.format), rated=False)
        if conversation.samples:
            cure = "`steerjax iterate` rates what it samples; or write each response as a row of 'messages'"
            raise DataError("sampled responses, which annotate does not rate", field="responses", cure=cure)
        conversation = replace(conversation, file=o.input, line=line, id=conversation.id or f"{o.input}:{line}")
        own = "turns" in row and o.format in ("auto", "conversation")
        return InputRow(conversation, carried(row) if own else conversation.to_json())

    total = sum(1 for _ in input_rows(o.input, read, skipped, on_bad_row=o.on_bad_row))
    scorer = open_scorer(about, o)
    size = o.chunk_rows or 128 * scorer.rows
    begin, end = (min(total, -(-total // size) * n // parts * size) for n in (number - 1, number))
    settings = {
        "command": "annotate", "source": o.input, "input": file_hashes([o.input])[o.input], "chunk_rows": size,
        "model": folder_checksum(scorer.description.path), "attributes": scorer.schema.to_json(),
        "row_length": scorer.row_length, "rows": scorer.rows, "part": f"{number}/{parts}",
        **{key: vars(o)[key] for key in ("turns", "format", "template", "dtype")},
    }  # fmt: skip
    path = o.output if parts == 1 else o.output.with_name(f"{o.output.stem}.part-{number}-of-{parts}{o.output.suffix}")
    with resumable(path, settings) as output:
        if not output.finished:
            output.skip(skipped if number == 1 else ())
            first = output.done // size * size
            left = islice(input_rows(o.input, read, [], on_bad_row=o.on_bad_row), begin + first, end)
            with progress(end - begin, first, "row") as bar:
                for rows, chunk in _ahead(_chunks(left, size, scorer, o.turns == "last", o.on_bad_row == "skip")):
                    annotated = _annotated(rows, chunk, scorer)
                    output.skip(chunk.refused.values())
                    output.add(bar.n, annotated)
                    bar.update(len(rows))
    print(f"{path} is finished" if output.finished else f"{end - begin} rows in {path}; {scorer.counts}")
    if output.listed:
        print(f"turns or rows that were left out are listed in {beside(path, 'skipped.jsonl')}")


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
    new = {key: {} for key in chunk.refused}
    for (place, turn), values in zip(chunk.examples, scorer.score(chunk), strict=True):
        new[place, turn] = predicted_keys(values, scorer.schema)
    out = [row.carried | {"turns": [*row.carried["turns"]], "id": row.conversation.id} for row in rows]
    for (place, turn), keys in new.items():
        old = out[place]["turns"][turn].items()
        out[place]["turns"][turn] = {k: v for k, v in old if k not in ("predicted_ratings", "predicted_label")} | keys
    return out
