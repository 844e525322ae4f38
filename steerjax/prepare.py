"""steerjax prepare SOURCE --input PATH [--input PATH ...] --output FILE

Turns raw data into the conversation format, one JSON object a line, and prints what is in it. The formats, and what
each SOURCE reads: docs/formats.md.
"""

import argparse
import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from steerjax.data.loading import load_conversations, split_by_prompt, write_skipped
from steerjax.data.oasst import read_threads
from steerjax.data.pairs import pairs_of
from steerjax.data.readers import source_path
from steerjax.data.statistics import format_statistics, statistics_of
from steerjax.errors import ConfigError, DataError, reported_errors
from steerjax.files import whole_file
from steerjax.locks import only_writer
from steerjax.schema import SCHEMAS, make_schema, parse_scalar
from steerjax.signals import cleans_up

SOURCES = {  # a format of rows, or oasst -> its schema
    "helpsteer": "helpsteer", "helpsteer2": "helpsteer", "oasst": "oasst", "reference": "steerlm",
    "sharegpt": "steerlm", "messages": "steerlm", "alpaca": "steerlm", "completion": "steerlm",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="steerjax prepare", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("source", choices=SOURCES, metavar="SOURCE", help=f"one of: {', '.join(SOURCES)}")
    add("--input", action="append", required=True, metavar="PATH",
        help="a file, embedded:NAME or hub:OWNER/NAME[/FOLDER][:SPLIT]; repeatable")  # fmt: skip
    add("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file; gzipped where it ends in .gz")
    add("--schema", choices=SCHEMAS, help="attributes that are taken (default: what SOURCE has)")
    add("--attribute", action="append", nargs=3, default=[], metavar=("NAME", "LOW", "HIGH"),
        help="one of your own, in place of the schema's; repeatable")  # fmt: skip
    add(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="error (default) stops; skip leaves them out and lists them in OUTPUT.skipped.jsonl",
    )
    add(
        "--on-duplicate",
        choices=("keep", "skip"),
        default="keep",
        help="rows that stand twice: keep counts them, skip also lists them in OUTPUT.skipped.jsonl",
    )
    higher = (
        "write pairs of responses, the higher rated one preferred: by an attribute, a weighted sum, or goodness, ..."
    )
    add("--pairs", metavar="NAME|NAME=W,...", help=higher)
    add("--least", type=float, metavar="D", help="pairs: ratings differ by at least this (default: any difference)")
    add("--each", type=int, metavar="N", help="pairs: a response is in at most N, drawn by chance (default: all)")
    add("--validation-output", type=Path, metavar="FILE", help="hold out a part of the prompts, into this file")
    add("--validation-fraction", type=float, metavar="PART", help="part of the prompts that is held out, e.g. 0.05")
    add("--seed", type=int, default=0, help="of the choice of prompts (default: 0)")
    add("--statistics", type=Path, metavar="FILE", help="also write the statistics, as JSON")
    add("--lang", metavar="CODE", help="oasst: only messages in this language, e.g. en")
    add("--keep-deleted", action="store_true", help="oasst: keep deleted messages")
    options = parser.parse_args(arguments)
    with reported_errors():
        _prepare(options)


def _prepare(o: argparse.Namespace) -> None:
    _check(o)
    with cleans_up(), only_writer(o.output):
        _write_all(o)


def _write_all(o: argparse.Namespace) -> None:
    try:
        own = [(name, float(low), float(high)) for name, low, high in o.attribute]
    except ValueError as error:
        raise ConfigError(f"--attribute: {error}; cure: NAME LOW HIGH, e.g. clarity 1 5") from None
    schema = make_schema(o.schema or SOURCES[o.source], own)
    dropped: Counter[str] = Counter()
    read = None
    if o.source == "oasst":
        read = partial(read_threads, schema=schema, lang=o.lang, keep_deleted=o.keep_deleted, dropped=dropped)
    options = {"format": o.source, "on_bad_row": o.on_bad_row, "on_duplicate": o.on_duplicate}
    loaded = load_conversations(o.input, schema, read=read, **options)
    rows, skipped = loaded.conversations, loaded.skipped
    if o.pairs is not None:
        rows = pairs_of(rows, parse_scalar(o.pairs, schema, "--pairs")[1], o.least or 0.0, o.each or 0)
        if not rows:
            cure = "a smaller --least, or rows with several rated responses to a prompt"
            raise DataError("no two responses to a prompt differ so much", file=o.input[0], cure=cure)
    parts = {o.output: rows}
    if o.validation_output:
        parts = dict(
            zip((o.output, o.validation_output), split_by_prompt(rows, o.validation_fraction, o.seed), strict=True)
        )
    found = statistics_of(rows, schema)
    found |= {"dropped": dict(dropped), "duplicates": loaded.duplicates, "skipped": len(skipped)}
    listing = o.output.with_name(o.output.name + ".skipped.jsonl")
    for path, part in parts.items():
        _write(path, (json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in part))
    if o.statistics:
        _write(o.statistics, [json.dumps(found, indent=2) + "\n"])
    listing.unlink(missing_ok=True)
    print(format_statistics(found), end="\n\n")
    for path, part in parts.items():
        print(f"{len(part)} rows in {path}")
    if skipped:
        write_skipped(listing, skipped)
        print(f"{len(skipped)} rows skipped, listed in {listing}")


def _check(o: argparse.Namespace) -> None:
    if o.least is not None and (o.pairs is None or o.least < 0):
        raise ConfigError(f"--least {o.least:g}: of pairs, and not below 0; cure: --pairs NAME beside it")
    if o.each is not None and (o.pairs is None or o.each < 1):
        raise ConfigError(f"--each {o.each}: of pairs, and at least 1; cure: --pairs NAME beside it")
    if o.source != "oasst" and (o.lang is not None or o.keep_deleted):
        raise ConfigError(f"--lang and --keep-deleted belong to oasst; cure: remove them for {o.source}")
    if (o.validation_fraction is None) != (o.validation_output is None):
        raise ConfigError("--validation-fraction and --validation-output need each other; cure: give both")
    listing = o.output.with_name(o.output.name + ".skipped.jsonl") if o.output.name else None
    for path in (o.output, o.validation_output, o.statistics):
        if path and (not path.name or (path.exists() and not path.is_file())):
            raise ConfigError(f"'{path}' is no name for a file; cure: name a file to write")
    written = [path.resolve() for path in (o.output, o.validation_output, o.statistics, listing) if path]
    read = [path.resolve() for path in map(source_path, o.input) if path]
    if twice := [path for i, path in enumerate(written) if path in (*read, *written[:i])]:
        raise ConfigError(f"{twice[0]} would be written over; cure: name another file")


def _write(path: Path, lines: Iterable[str]) -> None:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(whole_file(path, "wb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile(path.name, "wb", mtime=0, fileobj=file))
        file.writelines(line.encode() for line in lines)


if __name__ == "__main__":
    main()
