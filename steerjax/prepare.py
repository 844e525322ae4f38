"""python -m steerjax.prepare SOURCE --input PATH [--input PATH ...] --output FILE

Turns raw data into the conversation format (or, where people chose between two responses, the preference format),
one JSON object a line, and prints what is in it. The formats, and what each SOURCE reads: docs/formats.md.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from steerjax.data.loading import Skipped, held_out_prompts, prompt_key, usable_rows, write_skipped
from steerjax.data.oasst import read_threads
from steerjax.data.preferences import PREFERENCE_FORMATS, read_preferences
from steerjax.data.readers import read_conversations, source_path
from steerjax.data.statistics import ConversationStatistics, PreferenceStatistics, format_statistics
from steerjax.errors import ConfigError, DataError, reported_errors
from steerjax.schema import SCHEMAS

CONVERSATIONS = {  # SOURCE -> (format of the rows, schema)
    "helpsteer": ("helpsteer", "helpsteer"),
    "helpsteer2": ("helpsteer", "helpsteer"),
    "oasst": ("oasst", "oasst"),
    "reference": ("reference", "steerlm"),
    "regression": ("regression", "steerlm"),
    "sharegpt": ("sharegpt", "steerlm"),
    "messages": ("messages", "steerlm"),
    "alpaca": ("alpaca", "steerlm"),
}
PREFERENCES = tuple(name for name in PREFERENCE_FORMATS if name != "preference")
_OWN_OPTIONS = {"threads": "oasst", "lang": "oasst", "keep_deleted": "oasst", "split": "helpsteer2-preference"}

Read = Callable[[str], Iterator[tuple[int, Any]]]


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with reported_errors():
        _prepare(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m steerjax.prepare", description=__doc__.split("\n\n")[1])
    parser.add_argument("source", choices=(*CONVERSATIONS, *PREFERENCES), metavar="SOURCE",
                        help=f"one of: {', '.join((*CONVERSATIONS, *PREFERENCES))}")  # fmt: skip
    add = parser.add_argument
    add("--input", action="append", required=True, metavar="PATH",
        help="a file, embedded:NAME or hub:OWNER/NAME[/FOLDER][:SPLIT]; may stand several times")  # fmt: skip
    add("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file; gzipped where it ends in .gz")
    add("--schema", choices=tuple(SCHEMAS), help="attributes that are taken (default: what SOURCE has)")
    add("--on-bad-row", choices=("error", "skip"), default="error",
        help="skip lists them in OUTPUT.skipped.jsonl (default: error)")  # fmt: skip
    add("--on-duplicate", choices=("error", "keep", "skip"), default="error",
        help="what a row that stands twice is (default: error)")  # fmt: skip
    add("--validation-output", type=Path, metavar="FILE", help="hold out a part of the prompts, into this file")
    add("--validation-fraction", type=float, metavar="PART", help="of the prompts, e.g. 0.05")
    add("--seed", type=int, default=0, help="of the hold-out (default: 0)")
    add("--statistics", type=Path, metavar="FILE", help="write the statistics as JSON, too")
    add("--threads", choices=("once", "all"),
        help="oasst: rate a shared turn in its first thread only, for a reward model (once, the default), or in every "
        "thread, for SFT and as NeMo-Aligner does (all)")  # fmt: skip
    add("--lang", metavar="CODE", help="oasst: only messages in this language, e.g. en")
    add("--keep-deleted", action="store_true", default=None, help="oasst: keep deleted messages")
    add("--split", metavar="NAME", help="helpsteer2-preference: only rows whose column 'split' is NAME, e.g. train")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    _check(options)
    dropped: Counter[str] = Counter()
    skipped: list[Skipped] = []
    schema = SCHEMAS[options.schema or CONVERSATIONS.get(options.source, ("", "steerlm"))[1]]
    statistics = PreferenceStatistics() if options.source in PREFERENCES else ConversationStatistics(schema)
    rows = usable_rows(
        options.input, _explained(_reader(options, schema, dropped), dropped), skipped,
        on_bad_row=options.on_bad_row, on_duplicate=options.on_duplicate,
    )  # fmt: skip
    with ExitStack() as stack:
        output = stack.enter_context(_complete_file(options.output))
        if options.validation_output:
            validation = stack.enter_context(_complete_file(options.validation_output))
            counts = _write_split(rows, statistics, output, validation, options)
        else:
            counts = [sum(1 for row in _counted(rows, statistics) if _write(output, row))]
        result = {**statistics.to_json(), "dropped": dict(+dropped), "skipped": len(skipped)}
        if options.statistics:
            with _complete_file(options.statistics) as file:
                file.write(json.dumps(result, indent=2) + "\n")
        listing = options.output.with_name(options.output.name + ".skipped.jsonl")
        listing.unlink(missing_ok=True)
        if skipped:
            write_skipped(listing, skipped)
    print(format_statistics(result))
    print()
    for path, count in zip((options.output, options.validation_output), counts, strict=False):
        print(f"{count} rows in {path}")
    if skipped:
        print(f"{len(skipped)} rows skipped, listed in {listing}")


def _check(options: argparse.Namespace) -> None:
    for name, source in _OWN_OPTIONS.items():
        if getattr(options, name) is not None and options.source != source:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to {source}, not to {options.source}; remove it")
    if options.schema and options.source in PREFERENCES:
        raise ConfigError(f"--schema: {options.source} has no ratings; remove it")
    if (options.validation_fraction is None) != (options.validation_output is None):
        raise ConfigError("--validation-fraction and --validation-output need each other")
    written = [path.resolve() for path in (options.output, options.validation_output, options.statistics) if path]
    read = [path.resolve() for path in map(source_path, options.input) if path]
    for index, path in enumerate(written):
        if path in read or path in written[:index]:
            raise ConfigError(f"{path} would be written over; cure: name another file")


def _reader(options: argparse.Namespace, schema, dropped: Counter[str]) -> Read:
    if options.source in PREFERENCES:
        return lambda source: read_preferences(source, options.source, split=options.split, dropped=dropped)
    if options.source == "oasst":
        return lambda source: read_threads(
            source, schema, threads=options.threads or "once", lang=options.lang,
            keep_deleted=bool(options.keep_deleted), dropped=dropped,
        )  # fmt: skip
    return lambda source: read_conversations(source, schema, CONVERSATIONS[options.source][0])


def _explained(read: Read, dropped: Counter[str]) -> Read:
    """A source of which every row is dropped says so."""

    def rows(source: str) -> Iterator[tuple[int, Any]]:
        before, empty = dropped.copy(), True
        for item in read(source):
            empty = False
            yield item
        here = dropped - before
        if empty and here:
            reasons = ", ".join(f"{count} {reason}" for reason, count in here.items())
            cure = "--threads, --lang, --keep-deleted and --split decide what is dropped; see --help"
            raise DataError(f"no row is left: {reasons}", file=source, cure=cure)

    return rows


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


def _counted(rows: Iterable, statistics) -> Iterator:
    for row in rows:
        statistics.add(row)
        yield row


def _write(file: IO[str], row) -> bool:
    return bool(file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n"))


def _write_split(rows: Iterator, statistics, output: IO[str], validation: IO[str], options) -> list[int]:
    """Which prompts are held out is known after the last row, so the lines wait in a temporary file."""
    import tempfile

    keys = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as lines:
        for row in _counted(rows, statistics):
            _write(lines, row)
            keys.append(prompt_key(row))
        held_out = held_out_prompts(keys, options.validation_fraction, options.seed)
        if held_out >= set(keys):
            raise DataError(f"no prompt is left for training: there are {len(held_out)}", cure="add data")
        lines.seek(0)
        for key, line in zip(keys, lines, strict=True):
            (validation if key in held_out else output).write(line)
    held_out_rows = sum(key in held_out for key in keys)
    return [len(keys) - held_out_rows, held_out_rows]


if __name__ == "__main__":
    main()
