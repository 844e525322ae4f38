"""steerjax prepare SOURCE --input PATH [--input PATH ...] --output FILE

Turns raw data into the conversation format, one JSON object a line, and prints what is in it. The formats, and what
each SOURCE reads: docs/formats.md.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, split_by_prompt, usable_rows, write_skipped
from steerjax.data.oasst import read_threads
from steerjax.data.readers import read_conversations, source_path
from steerjax.data.statistics import Statistics, format_statistics
from steerjax.errors import ConfigError, reported_errors
from steerjax.schema import SCHEMAS, Schema, make_schema

SOURCES = {  # a format of rows, or oasst -> its schema
    "helpsteer": "helpsteer", "helpsteer2": "helpsteer", "oasst": "oasst", "reference": "steerlm",
    "regression": "steerlm", "sharegpt": "steerlm", "messages": "steerlm", "alpaca": "steerlm",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with reported_errors():
        _prepare(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="steerjax prepare", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("source", choices=SOURCES, metavar="SOURCE", help=f"one of: {', '.join(SOURCES)}")
    add("--input", action="append", required=True, metavar="PATH",
        help="a file, embedded:NAME or hub:OWNER/NAME[/FOLDER][:SPLIT]; may stand several times")  # fmt: skip
    add("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file; gzipped where it ends in .gz")
    add("--schema", choices=tuple(SCHEMAS), help="attributes that are taken (default: what SOURCE has)")
    add("--attribute", action="append", nargs=3, default=[], metavar=("NAME", "LOW", "HIGH"),
        help="an attribute of your own, in place of the schema's; may stand several times")  # fmt: skip
    add("--on-bad-row", choices=("error", "skip"), default="error",
        help="skip lists them in OUTPUT.skipped.jsonl (default: error)")  # fmt: skip
    add("--on-duplicate", choices=("keep", "skip", "error"), default="keep",
        help="what a row that stands twice is (default: keep)")  # fmt: skip
    add("--validation-output", type=Path, metavar="FILE", help="hold out a part of the prompts, into this file")
    add("--validation-fraction", type=float, metavar="PART", help="of the prompts, e.g. 0.05")
    add("--seed", type=int, default=0, help="of the hold-out (default: 0)")
    add("--statistics", type=Path, metavar="FILE", help="write the statistics as JSON, too")
    add("--lang", metavar="CODE", help="oasst: only messages in this language, e.g. en")
    add("--keep-deleted", action="store_true", help="oasst: keep deleted messages")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    _check(options)
    schema = _schema(options)
    dropped: Counter[str] = Counter()
    skipped: list[Skipped] = []
    duplicates: list[Skipped] = []

    def read(source: str):
        if options.source != "oasst":
            return read_conversations(source, schema, options.source)
        return read_threads(source, schema, lang=options.lang, keep_deleted=options.keep_deleted, dropped=dropped)

    statistics = Statistics(schema)
    rows = usable_rows(
        options.input, read, skipped, duplicates, on_bad_row=options.on_bad_row, on_duplicate=options.on_duplicate
    )
    paths, parts = [options.output], [rows]
    if options.validation_output:
        paths.append(options.validation_output)
        parts = split_by_prompt(list(rows), options.validation_fraction, options.seed)
    with ExitStack() as stack:
        files = [stack.enter_context(_complete_file(path)) for path in paths]
        counts = [_write(*part, statistics) for part in zip(parts, files, strict=True)]
        result = {
            **statistics.to_json(), "dropped": dict(+dropped), "duplicates": len(duplicates), "skipped": len(skipped)
        }  # fmt: skip
        if options.statistics:
            with _complete_file(options.statistics) as file:
                file.write(json.dumps(result, indent=2) + "\n")
        listing = options.output.with_name(options.output.name + ".skipped.jsonl")
        listing.unlink(missing_ok=True)
        if skipped:
            write_skipped(listing, skipped)
    print(format_statistics(result), end="\n\n")
    for path, count in zip(paths, counts, strict=True):
        print(f"{count} rows in {path}")
    if skipped:
        print(f"{len(skipped)} rows skipped, listed in {listing}")


def _check(options: argparse.Namespace) -> None:
    if options.source != "oasst" and (options.lang is not None or options.keep_deleted):
        raise ConfigError(f"--lang and --keep-deleted belong to oasst; cure: remove them for {options.source}")
    if (options.validation_fraction is None) != (options.validation_output is None):
        raise ConfigError("--validation-fraction and --validation-output need each other; cure: give both")
    written = [path.resolve() for path in (options.output, options.validation_output, options.statistics) if path]
    read = [path.resolve() for path in map(source_path, options.input) if path]
    for index, path in enumerate(written):
        if path in read or path in written[:index]:
            raise ConfigError(f"{path} would be written over; cure: name another file")


def _schema(options: argparse.Namespace) -> Schema:
    try:
        attributes = [(name, float(low), float(high)) for name, low, high in options.attribute]
    except ValueError as error:
        raise ConfigError(f"--attribute: {error}; cure: NAME LOW HIGH, e.g. clarity 1 5") from None
    return make_schema(options.schema or SOURCES[options.source], attributes)


@contextmanager
def _complete_file(path: Path) -> Iterator[IO[str]]:
    """A text file to write that gets its name only when it is complete.

    Raises:
        ConfigError: it cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: this is a folder; cure: name a file")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed, io.TextIOWrapper(packed, "utf-8") as file:
                    yield file
            else:
                with io.TextIOWrapper(raw, "utf-8", newline="\n") as file:
                    yield file
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; cure: name another file") from error
    finally:
        if partial.exists():
            partial.unlink()


def _write(rows: Iterable[Conversation], file: IO[str], statistics: Statistics) -> int:
    count = 0
    for row in rows:
        count += 1
        statistics.add(row)
        file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
    return count


if __name__ == "__main__":
    main()
