"""Rows of any source -> `Conversation`s.

A source is a file, `embedded:NAME` or `hub:ID[:SPLIT]`. A row that cannot be used is handed on as a `DataError` in its
place, so that the caller may skip it; a file that cannot be read as a whole raises.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from steerjax.data.conversation import Conversation
from steerjax.data.formats import Row, check_format, conversation_from_row
from steerjax.errors import DataError
from steerjax.schema import Schema

Rows = Iterator[tuple[int, Row | DataError]]

EMBEDDED = ("helpsteer", "helpsteer2")
_SAMPLES = Path(__file__).with_name("samples")
_HELPSTEER2 = ("embedded:helpsteer2", "hub:nvidia/HelpSteer2")  # their prompts embed markers by design
_TEXT_COLUMNS = ("id", "prompt", "response", "system", "instruction", "input", "output")


def read_conversations(
    source: str, schema: Schema, format: str = "auto"
) -> Iterator[tuple[int, Conversation | DataError]]:
    """(line, conversation) of a source; a row that cannot be used is a DataError with its file and line.

    Raises:
        DataError: the source cannot be read at all. ConfigError: unknown format.
    """
    check_format(format)
    if format == "auto" and source.startswith(_HELPSTEER2):
        format = "helpsteer2"
    for line, row in iter_rows(source):
        try:
            if isinstance(row, DataError):
                raise row
            conversation = conversation_from_row(row, schema, format)
            yield line, replace(conversation, file=source, line=line, id=conversation.id or f"{source}:{line}")
        except DataError as error:
            yield line, error.at(source, line)


def iter_rows(source: str) -> Rows:
    """(line, row) of a source; a row that does not parse is a DataError in the row's place.

    Lines count from 1: a physical line of .jsonl, .csv and .tsv (a record's first one), the row elsewhere. Dates of a
    table are text in the row; bytes and NaN stay what they are.

    Raises:
        DataError: no such file, an unknown extension, or a file that is broken as a whole.
    """
    path = source_path(source)
    if path is None:
        return ((line, _plain(row)) for line, row in enumerate(hub_dataset(source), start=1))
    extension = Path(path.name.lower().removesuffix(".gz")).suffix
    if extension not in _FILE_READERS:
        cure = f"use one of: {', '.join(_FILE_READERS)} (each also as .gz)"
        raise DataError(f"unknown file type '{extension}'", file=source, cure=cure)
    return _located(path, _FILE_READERS[extension], source)


def source_path(source: str) -> Path | None:
    """The file behind a source; None for a hub id.

    Raises:
        DataError: there is no such file or embedded sample.
    """
    if source.startswith("hub:"):
        return None
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        if name not in EMBEDDED:
            raise DataError(f"no embedded sample '{name}'", file=source, cure=f"use one of: {', '.join(EMBEDDED)}")
        return _SAMPLES / f"{name}.jsonl.gz"
    path = Path(source)
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "no such file"
        raise DataError(what, file=source, cure="name a file, embedded:NAME, or hub:ID for a dataset of the hub")
    return path


def hub_dataset(source: str):
    """The `datasets.Dataset` of `hub:OWNER/NAME[/FOLDER][:SPLIT]` (split `train` if none is named).

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    name, _, split = source.removeprefix("hub:").partition(":")
    parts = name.split("/")
    folder = {"data_dir": "/".join(parts[2:])} if parts[2:] else {}
    try:
        return datasets.load_dataset("/".join(parts[:2]), split=split or "train", **folder)
    except Exception as error:  # network, unknown id, unknown split, broken files: each its own type
        cure = "check the id, the split and the network, or download the file and name its path"
        raise DataError(f"cannot load from the hub: {error}", file=source, cure=cure) from error


def _located(path: Path, read, source: str) -> Rows:
    try:
        with _opened(path) as file:
            for line, row in read(file):
                yield line, row.at(source, line) if isinstance(row, DataError) else row
    except DataError as error:
        raise error.at(source, error.line) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read: {error}", file=source, cure="copy or download the file again") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes; unpacked where they are gzip's, whatever its name says."""
    with path.open("rb") as raw:
        if raw.peek(2)[:2] != b"\x1f\x8b":
            yield raw
        else:
            with gzip.open(raw) as unpacked:
                yield unpacked


# Text


def _decode(raw: bytes) -> str:
    """UTF-8 with or without a byte order mark; UTF-16, as Excel's "Unicode text" has it, with one."""
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        if utf16:
            raise DataError(f"broken UTF-16: {error.reason}", line=line, cure="save it as UTF-8") from None
        cure = "convert the file, e.g. iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        raise DataError(f"not UTF-8: byte 0x{raw[error.start]:02x}", line=line, cure=cure) from None


def _parse(text: str, cure: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        message = f"broken JSON: {error.msg}, column {error.colno}"
        raise DataError(message, line=error.lineno, cure=cure) from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise DataError(f"broken JSON: {error}", cure=cure) from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError("the key stands twice", field=twice, cure="keep one of the two")
    return row


def _checked_row(value: Any) -> Row | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"expected an object, got {type(value).__name__}", cure='write a row as {"prompt": ..., ...}')


def _jsonl_rows(file: IO[bytes]) -> Rows:
    for line, raw in enumerate(file, start=1):
        if line == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            cure = "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
            raise DataError("UTF-16, where lines of JSON are UTF-8", line=1, cure=cure)
        if raw.strip():
            cure = "write one object a line; a list of objects belongs in a .json file"
            try:
                yield line, _checked_row(_parse(_decode(raw), cure))
            except DataError as error:
                yield line, error


def _json_rows(file: IO[bytes]) -> Rows:
    rows = _parse(_decode(file.read()), "write a list of objects; one object a line belongs in a .jsonl file")
    if not isinstance(rows, list):
        raise DataError("expected a list of objects", line=1, cure="write [{...}, {...}], or use a .jsonl file")
    yield from enumerate(map(_checked_row, rows), start=1)


# Tables


def _csv_rows(file: IO[bytes]) -> Rows:
    """Strictly: after a record that is broken nothing says where the next begins, so the file is refused.

    (pandas' and pyarrow's readers join the rows from a quote that is left open to the next one.)
    """
    text = _decode(file.read())
    separator = max(",\t;", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    records, line = [], 1
    limit = csv.field_size_limit(len(text) + 1)  # the whole module's, so it is put back
    try:
        for cells in reader:
            records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        cure = "quote the cell, double the quotes in it, and check the rows before it for a quote that is left open"
        raise DataError(f"broken CSV: {error}", line=line, cure=cure) from None
    finally:
        csv.field_size_limit(limit)
    (start, header), *records = [(line, cells) for line, cells in records if cells] or [(1, [""])]
    if not {"prompt", "instruction"} & set(header):
        cure = "begin the file with a line like prompt,response,helpfulness,correctness"
        raise DataError("the header lacks this column", line=start, field="prompt", cure=cure)
    _check_columns(header, start)
    for line, cells in records:
        if len(cells) != len(header):
            message = f"{len(cells)} cells under a header of {len(header)}"
            raise DataError(message, line=line, cure="quote cells that contain separators or line breaks")
    for line, cells in records:
        yield line, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def _cell(name: str, cell: str) -> str | float | None:
    """An empty cell is a missing value; numbers are parsed, except in columns that hold text."""
    if not cell.strip():
        return None
    try:
        return cell if name in _TEXT_COLUMNS else float(cell)
    except ValueError:
        return cell


def _check_columns(names: list[str], line: int = 0) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError("the table has this column twice", line=line, field=twice[0], cure="rename or remove one")


def _table_rows(file: IO[bytes]) -> Rows:
    """Parquet, or Arrow's file or stream format, which is what `datasets` stores."""
    import pyarrow.ipc
    import pyarrow.parquet

    magic = file.peek(6)[:6]
    file = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file  # tables are read from their end
    try:
        if magic == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            names, batches = table.schema.names, map(table.get_batch, range(table.num_record_batches))
        elif magic[:4] == b"PAR1":
            table = pyarrow.parquet.ParquetFile(file)
            names, batches = table.schema_arrow.names, table.iter_batches(batch_size=1024)
        else:
            batches = pyarrow.ipc.open_stream(file)
            names = batches.schema.names
        _check_columns(names)
        yield from enumerate((_plain(row) for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"broken table: {error}", cure="write the file again, e.g. with pyarrow") from error


def _plain(value: Any) -> Any:
    """Values that JSON has no form for, as text or numbers; bytes stay, and are refused where they are used."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | uuid.UUID):
        return str(value)
    return float(value) if isinstance(value, decimal.Decimal) else value


_FILE_READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}
