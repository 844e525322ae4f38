"""Rows of any source -> `Conversation`s.

A source is a file (.jsonl, .json, .csv, .parquet, each also as .gz), `embedded:NAME` or `hub:ID[:SPLIT]`. A row that
cannot be used is handed on as a `DataError` in its place, so that the caller may skip it; a file that cannot be read
at all raises.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from steerjax.data.conversation import Conversation
from steerjax.data.formats import Row, check_format, conversation_from_row
from steerjax.errors import DataError
from steerjax.schema import Schema

T = TypeVar("T")
Rows = Iterator[tuple[int, Row | DataError]]

EMBEDDED = ("helpsteer", "helpsteer2")
_SAMPLES = Path(__file__).with_name("samples")
_INSTALL = "pip install 'steerjax[datasets]'"


# Sources -> rows


def iter_rows(source: str) -> Rows:
    """(line, row) of a source; a row that does not parse is a DataError in the row's place.

    Lines count from 1: a physical line of .jsonl and .csv (a record's first one), the index of a row elsewhere.

    Raises:
        DataError: no such file, an unknown extension, or a file that is broken as a whole.
    """
    return _located(_source_rows(source), source)


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
        DataError: `datasets` is missing or cannot load it.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("hub ids need the package 'datasets'", file=source, cure=_INSTALL) from None
    name, _, split = source.removeprefix("hub:").partition(":")
    parts = name.split("/")
    folder = {"data_dir": "/".join(parts[2:])} if parts[2:] else {}
    try:
        return datasets.load_dataset("/".join(parts[:2]), split=split or "train", **folder)
    except Exception as error:  # network, unknown id, unknown split, broken files: each its own type
        cure = "check the id, the split and the network, or download the file and name its path"
        raise DataError(f"cannot load from the hub: {error}", file=source, cure=cure) from error


def _source_rows(source: str) -> Rows:
    path = source_path(source)
    if path is None:
        return enumerate(hub_dataset(source), start=1)
    extension = Path(path.name.lower().removesuffix(".gz")).suffix
    if extension not in _FILE_READERS:
        cure = f"use one of: {', '.join(_FILE_READERS)} (each also as .gz)"
        raise DataError(f"unknown file type '{extension}'", file=source, cure=cure)
    return _FILE_READERS[extension](path)


def _attempt(read: Callable[..., T], *args) -> T | DataError:
    try:
        return read(*args)
    except DataError as error:
        return error


def _located(rows: Rows, source: str) -> Rows:
    try:
        for line, row in rows:
            yield line, row.at(source, line) if isinstance(row, DataError) else row
    except DataError as error:
        raise error.at(source, error.line) from error


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as handle:
            yield handle
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read: {error}", cure="check that the file is whole and readable") from error


def _lines(handle: IO[bytes]) -> Iterator[bytes]:
    for index, raw in enumerate(handle):
        yield raw if index else raw.removeprefix(codecs.BOM_UTF8)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x}",
            line=raw.count(b"\n", 0, error.start) + 1,
            cure="convert the file, e.g. iconv -f WINDOWS-1252 -t UTF-8",
        ) from None


class _Pairs(list):
    """A JSON object as it stands in the file, so that a key that stands twice is seen."""


def _parse_json(text: str, cure: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        message = f"broken JSON: {error.msg}, column {error.colno}"
        raise DataError(message, line=error.lineno, cure=cure) from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"broken JSON: {error}", cure=cure) from None
    except RecursionError:
        raise DataError("nested too deep", cure=cure) from None


def _plain(value: Any) -> Any:
    """Parsed JSON with objects as dicts, none of which has a key twice."""
    if isinstance(value, _Pairs):
        plain = {key: _plain(inner) for key, inner in value}
        if len(plain) < len(value):
            keys = [key for key, _ in value]
            twice = next(key for key in plain if keys.count(key) > 1)
            raise DataError("the key stands twice", field=twice, cure="keep one of the two")
        return plain
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _json_row(value: Any) -> Row:
    try:
        row = _plain(value)
    except RecursionError:
        raise DataError("nested too deep", cure="write the row in one of the formats of docs/formats.md") from None
    if not isinstance(row, dict):
        raise DataError(f"expected an object, got {type(row).__name__}", cure='write a row as {"prompt": ..., ...}')
    return row


def _jsonl_row(raw: bytes) -> Row:
    return _json_row(_parse_json(_decode(raw), "write one object a line; a list of objects belongs in a .json file"))


def _jsonl_rows(path: Path) -> Rows:
    with _opened(path) as handle:
        for line, raw in enumerate(_lines(handle), start=1):
            if raw.strip():
                yield line, _attempt(_jsonl_row, raw)


def _json_rows(path: Path) -> Rows:
    with _opened(path) as handle:
        text = _decode(handle.read().removeprefix(codecs.BOM_UTF8))
    value = _parse_json(text, "write a list of objects; one object a line belongs in a .jsonl file")
    if not isinstance(value, list) or isinstance(value, _Pairs):
        raise DataError("expected a list of objects", line=1, cure="write [{...}, {...}], or use a .jsonl file")
    for index, row in enumerate(value, start=1):
        yield index, _attempt(_json_row, row)


def _csv_rows(path: Path) -> Rows:
    with _opened(path) as handle:
        # Bytes that are no UTF-8 pass as surrogates, so that one bad row does not end the reader.
        reader = csv.reader((raw.decode("utf-8", "surrogateescape") for raw in _lines(handle)), strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                broken = DataError(f"broken CSV: {error}", line=line, cure="quote the cell and double the quotes in it")
                if not header:
                    raise broken from None
                yield line, broken
                continue
            if not header:
                header = _csv_header(cells or [])
            elif cells is None:
                return
            elif cells:
                yield line, _attempt(_csv_row, header, cells)


def _csv_header(cells: list[str]) -> list[str]:
    _decode(",".join(cells).encode("utf-8", "surrogateescape"))
    for name in ("prompt", "response"):
        if name not in cells:
            cure = "begin the file with a line like prompt,response,helpfulness,correctness"
            raise DataError("the header lacks this column", line=1, field=name, cure=cure)
    twice = [name for name in cells if cells.count(name) > 1]
    if twice:
        raise DataError("the header has this column twice", line=1, field=twice[0], cure="rename or remove one")
    return cells


def _csv_row(header: list[str], cells: list[str]) -> Row:
    _decode(",".join(cells).encode("utf-8", "surrogateescape"))
    if len(cells) != len(header):
        message = f"{len(cells)} cells under a header of {len(header)}"
        raise DataError(message, cure="quote cells that contain commas or line breaks")
    return {name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def _csv_cell(name: str, cell: str) -> str | float | None:
    """An empty cell is a missing value; numbers are parsed, except in columns that hold text."""
    if not cell.strip():
        return None
    if name in ("prompt", "response", "system"):
        return cell
    try:
        return float(cell)
    except ValueError:
        return cell


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("Parquet files need the package 'pyarrow'", cure=_INSTALL) from None
    with _opened(path) as handle:
        try:
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(handle.read()) if _is_gzip(path) else handle)
            names = table.schema_arrow.names
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise DataError("the table has this column twice", field=twice[0], cure="rename or remove one")
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1024))
            yield from enumerate((row for batch in batches for row in batch), start=1)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"broken Parquet: {error}", cure="write the file again, e.g. with pyarrow") from error


_FILE_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


# Rows -> conversations


def read_conversations(
    source: str, schema: Schema, format: str = "auto"
) -> Iterator[tuple[int, Conversation | DataError]]:
    """(line, conversation) of a source; a row that cannot be used is a DataError with its file and line.

    Raises:
        DataError: the source cannot be read at all. ConfigError: unknown format.
    """
    check_format(format)
    for line, row in iter_rows(source):
        result = row if isinstance(row, DataError) else _attempt(conversation_from_row, row, schema, format)
        if isinstance(result, DataError):
            yield line, result.at(source, line)
        else:
            yield line, replace(result, file=source, line=line, id=result.id or f"{source}:{line}")
