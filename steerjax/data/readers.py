"""Rows of any source (a file, `embedded:NAME`, `hub:ID[@CONFIG][:SPLIT]`) -> `Conversation`s."""

import codecs
import csv
import decimal
import functools
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from steerjax.data.conversation import Conversation
from steerjax.data.formats import JsonRow, conversation_from_row, unread_numbers
from steerjax.errors import DataError
from steerjax.schema import Schema
from steerjax.typed import typed

T = TypeVar("T")
Rows = Iterator[tuple[int, JsonRow | DataError]]

EMBEDDED = ("helpsteer", "helpsteer2")
_SAMPLES = Path(__file__).with_name("samples")
_SEPARATOR = re.compile(r'sep=([^"\r\n])\r?\n')
_LONGEST = 16 << 20  # bytes of a line: millions of tokens, and as objects they may take twenty times as much
_SWELLS = 100  # times that a packed file may grow; text grows tenfold
_TEXT_COLUMNS = ("id", "prompt", "response", "system", "instruction", "input", "output")


def read_conversations(
    source: str, schema: Schema, format: str = "auto", unread: dict[str, None] | None = None
) -> Iterator[tuple[int, Conversation | DataError]]:
    """(line, conversation) of a source; a row that cannot be used is a DataError in its place.

    Keys with numbers that nothing reads are added to `unread`. Raises as `iter_rows`, and ConfigError: unknown format.
    """
    format = source_format(source, format)
    for line, row in iter_rows(source):
        try:
            if isinstance(row, DataError):
                raise row
            conversation = conversation_from_row(row, schema, format)
            if unread is not None:
                unread |= dict.fromkeys(unread_numbers(row, schema))
            yield line, replace(conversation, file=source, line=line, id=conversation.id or f"{source}:{line}")
        except DataError as error:
            yield line, error.at(source, line)


def source_format(source: str, format: str) -> str:
    """`auto` is `helpsteer2` for HelpSteer2, whose prompts embed markers by design."""
    known = format == "auto" and source.startswith(("embedded:helpsteer2", "hub:nvidia/HelpSteer2"))
    return "helpsteer2" if known else format


def iter_rows(source: str) -> Rows:
    """(line, row) of a source; a row that does not parse is a DataError in its place.

    Lines count from 1: a physical line of .jsonl, .csv and .tsv (a record's first one), the row elsewhere.

    Raises DataError: no such file, an unknown extension, or a file that is broken as a whole.
    """
    path = source_path(source)
    if path is None:
        return ((line, _plain(row)) for line, row in enumerate(hub_dataset(source), start=1))
    extension = Path(path.name.lower().removesuffix(".gz")).suffix
    if extension not in _FILE_READERS:
        cure = f"use one of: {', '.join(_FILE_READERS)} (each also as .gz)"
        raise DataError(f"unknown file type '{extension}'", file=source, cure=cure)
    return _file_rows(path, extension, source)


def typed_rows(source: str, kind: type[T], cure: str) -> Iterator[tuple[int, T]]:
    """(line, row) of a source, each as a `kind`, a `row_type`. Raises DataError as `typed`, with file and line."""
    for line, row in iter_rows(source):
        if isinstance(row, DataError):
            raise row
        yield line, typed(kind, row, "row", functools.partial(DataError, cure=cure, file=source, line=line))


def source_path(source: str) -> Path | None:
    """The file behind a source; None for a hub id. Raises DataError: there is none."""
    if source.startswith("hub:"):
        return None
    if source.startswith("embedded:"):
        if (name := source.removeprefix("embedded:")) in EMBEDDED:
            return _SAMPLES / f"{name}.jsonl.gz"
        raise DataError(f"no embedded sample '{name}'", file=source, cure=f"use one of: {', '.join(EMBEDDED)}")
    path = Path(source)
    try:
        found = path.is_file()
    except ValueError as error:  # a NUL in the name
        raise DataError(f"no such file: {error}", file=repr(source), cure="name a file") from None
    if not found:
        what = "this is a folder" if path.is_dir() else "this is no plain file" if path.exists() else "no such file"
        raise DataError(what, file=source, cure="name a file, embedded:NAME, or hub:ID for a dataset of the hub")
    return path


def hub_dataset(source: str):
    """The `datasets.Dataset` of `hub:OWNER/NAME[/FOLDER][@CONFIG][:SPLIT]` (else split `train`).

    Raises DataError: it cannot be loaded; of a config or split that has to be named, the choices are in the message.
    """
    import datasets

    place, _, split = source.removeprefix("hub:").partition(":")
    place, _, config = place.partition("@")
    owner, *folder = place.split("/", 2)
    options = ({"data_dir": folder.pop()} if folder[1:] else {}) | ({"name": config} if config else {})
    try:
        return datasets.load_dataset("/".join([owner, *folder]), split=split or "train", **options)
    except Exception as error:  # network, unknown id, unknown split, broken files: each its own type
        cure = "check id, split and network, or download the file and name its path"
        if choices := re.search(r"\[('.*')\]", said := str(error)):  # of configs, or of splits
            whole = ("hub:" + place, f"@{config}" if config else "", f":{split}" if split else "")
            whole = (whole[0], "@CONFIG", whole[2]) if "onfig" in said else (*whole[:2], ":SPLIT")
            cure = f"{''.join(whole)}, one of {choices[1]}"
        raise DataError(f"cannot load from the hub: {error}", file=source, cure=cure) from error


def _file_rows(path: Path, extension: str, source: str) -> Rows:
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":  # gzip's, whatever the name says
                file = _Unpacked(fileobj=file)
            if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # Excel's "Unicode text"
                file = io.BufferedReader(io.BytesIO(file.read().decode("utf-16").encode("utf-8")))
            for line, row in _FILE_READERS[extension](file):
                if not isinstance(row, dict | DataError):
                    row = DataError(f"expected an object, got {type(row).__name__}", cure="write a row as {...}")
                yield line, row.at(source, line) if isinstance(row, DataError) else row
    except DataError as error:
        raise error.at(source, error.line) from error
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise DataError(f"cannot read: {error}", file=source, cure="copy or download the file again") from error


class _Unpacked(gzip.GzipFile):
    """Gzip's, which ends where a small file would fill the memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size >= 0:
            return self._checked(super().read(size))
        return b"".join(iter(lambda: self.read(1 << 20), b""))

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline(size))

    def _checked(self, data: bytes) -> bytes:
        if self.tell() > (16 << 20) + _SWELLS * os.fstat(self.fileno()).st_size:
            cure = "look at what gunzip makes of it, and name that file"
            raise DataError(f"unpacks to more than {_SWELLS} times its size", cure=cure)
        return data


def _decode(raw: bytes) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        cure = "convert the file, e.g. iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        raise DataError(f"not UTF-8: byte 0x{raw[error.start]:02x}", line=line, cure=cure) from None


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(_decode(raw), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets, are no JSONDecodeError
        line, what = 0, str(error)
        if isinstance(error, json.JSONDecodeError):
            line, what = error.lineno, f"{error.msg}, column {error.colno}"
        cure = "write a list of objects, or one object a line"
        raise DataError(f"broken JSON: {what}", line=line, cure=cure) from None


def _object(pairs: Iterable[tuple[str, Any]]) -> JsonRow:
    row: JsonRow = {}
    for key, value in pairs:
        if key in row:
            raise DataError("stands twice", key, "keep one of the two")
        row[key] = value
    return row


def _json_rows(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """A list of objects, or one object a line, of which a broken one does not end the file."""
    if file.peek(16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from enumerate(_parse(file.read()), start=1)
        return
    for line, raw in enumerate(iter(functools.partial(file.readline, _LONGEST + 1), b""), start=1):
        if len(raw) > _LONGEST:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(_LONGEST)
            what = f"a line of more than {_LONGEST >> 20} MiB"
            yield line, DataError(what, cure="break the line where a row ends, or remove the row")
        elif raw.strip():
            try:
                yield line, _parse(raw)
            except DataError as error:
                yield line, error


def _csv_rows(file: IO[bytes]) -> Rows:
    """Strict: after a broken record nothing says where the next begins. (pandas' and pyarrow's readers would join rows
    from an open quote to the next.)"""
    text = _decode(file.read())
    if named := _SEPARATOR.match(text):  # Excel's own first line
        text = text[named.end() :]
    first = re.sub(r'"[^"]*"', "", text.splitlines()[0]) if text else ""
    separator = named[1] if named else max(",\t;", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header, rows, line = [], [], 1 + bool(named)
    limit = csv.field_size_limit(len(text) + 1)  # the whole module's, so it is put back
    try:
        for cells in reader:
            if header and cells and len(cells) != len(header):
                raise csv.Error(f"{len(cells)} cells under a header of {len(header)}")
            if header and cells:
                rows.append((line, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}))
            names = ((name.strip() or f"column {place}", None) for place, name in enumerate(cells, start=1))
            header = header or list(_object(names))
            line = reader.line_num + 1 + bool(named)
    except csv.Error as error:
        cure = "quote cells with separators or line breaks, double the quotes in them, and close each before this line"
        raise DataError(f"broken CSV: {error}", line=line, cure=cure) from None
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _cell(name: str, cell: str) -> str | float | None:
    """Empty is missing; numbers are parsed, except in columns that hold text."""
    try:
        number = name not in _TEXT_COLUMNS and "_" not in cell  # to Python 0_4 is 4
        return (float(cell) if number else cell) if cell.strip() else None
    except ValueError:
        return cell


def _table_rows(file: IO[bytes]) -> Rows:
    """Parquet, or Arrow's file or stream format, which is what `datasets` stores."""
    import pyarrow.ipc
    import pyarrow.parquet

    raw = file.read()
    try:
        if raw.startswith(b"PAR1"):
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
            names, batches = table.schema_arrow.names, table.iter_batches(1024)
        elif raw.startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(raw)
            names, batches = table.schema.names, map(table.get_batch, range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(raw)
            names = batches.schema.names
        _object((name, None) for name in names)

        def sliced():
            for batch in batches:
                batch.validate(full=True)  # a damaged offset ends the process elsewhere
                yield from (batch.slice(start, 1024) for start in range(0, batch.num_rows, 1024))

        yield from enumerate((_plain(row) for part in sliced() for row in part.to_pylist()), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:  # the last: a date past year 9999
        raise DataError(f"broken table: {error}", cure="write the file again, e.g. with pyarrow") from error


def _plain(value: Any) -> Any:
    """Dates and the like as text, decimals as numbers; bytes stay, and are refused where they are used."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    return value if isinstance(value, str | int | float | bytes | None) else str(value)


_FILE_READERS = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}
