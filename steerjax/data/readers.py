"""Rows of any source -> `Conversation`s.

A source is a file (.jsonl, .json, .csv, .parquet, each also as .gz), `embedded:NAME` or `hub:ID[:SPLIT]`. A row that
cannot be used is handed on as a `DataError` in its place, so that the caller may skip it; a file that cannot be read
at all raises. Formats: docs/formats.md; reference/steerlm.md 2.1 to 2.6.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from steerjax.attributes import SCHEMAS, STEERLM, AttributeSchema, parse_label
from steerjax.data.conversation import ROLES, Conversation, Turn, checked_ratings
from steerjax.errors import ConfigError, DataError

T = TypeVar("T")
Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | DataError]]

EMBEDDED = ("helpsteer", "helpsteer2")
_SAMPLES = Path(__file__).with_name("samples")
_INSTALL = "pip install 'steerjax[datasets]'"

_MISSING_LABEL = -100  # the regression format's "not rated"
_SYSTEM_START, _TURN_START, _TEXT_END = "<extra_id_0>System\n", "\n<extra_id_1>", "\n<extra_id_2>"
_PROMPT_MARKER = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
_LABEL_TYPES = ("VALUE_TO_TEXT", "TEXT_TO_VALUE", None)  # where the reference writes the label; all mean the same here


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
    """The `datasets.Dataset` of `hub:ID[:SPLIT]` (split `train` if none is named).

    Raises:
        DataError: `datasets` is missing or cannot load it.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("hub ids need the package 'datasets'", file=source, cure=_INSTALL) from None
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
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
    source: str, schema: AttributeSchema, format: str = "auto"
) -> Iterator[tuple[int, Conversation | DataError]]:
    """(line, conversation) of a source; a row that cannot be used is a DataError with its file and line.

    Raises:
        DataError: the source cannot be read at all. ConfigError: unknown format.
    """
    _check_format(format)
    for line, row in iter_rows(source):
        result = row if isinstance(row, DataError) else _attempt(conversation_from_row, row, schema, format)
        if isinstance(result, DataError):
            yield line, result.at(source, line)
        else:
            yield line, replace(result, file=source, line=line, id=result.id or f"{source}:{line}")


def conversation_from_row(row: Row, schema: AttributeSchema, format: str = "auto") -> Conversation:
    """One row as a conversation; `format` is a key of `FORMATS`, or "auto" to tell it from the row's keys.

    Raises:
        DataError: the row cannot be used; names the field. ConfigError: unknown format.
    """
    _check_format(format)
    return FORMATS[_detect_format(row) if format == "auto" else format](row, schema)


def _check_format(format: str) -> None:
    if format not in FORMATS and format != "auto":
        raise ConfigError(f"unknown format '{format}'; use one of: auto, {', '.join(FORMATS)}")


_TELLING_KEYS = {
    "helpsteer": {"prompt", "response"},
    "regression": {"text"},
    "reference": {"conversations"},
    "conversation": {"turns"},
}


def _detect_format(row: Row) -> str:
    found = [name for name, keys in _TELLING_KEYS.items() if keys & row.keys()]
    if len(found) == 1:
        return found[0]
    what = f"the row could be any of: {', '.join(found)}" if found else f"unknown format with keys {list(row)}"
    raise DataError(what, cure=f"set format to one of: {', '.join(FORMATS)} (docs/formats.md)")


def _from_helpsteer(row: Row, schema: AttributeSchema) -> Conversation:
    rated = {name: row[name] for name in schema.names if name in row}
    if not rated:
        message = f"no attribute of the schema is there: {', '.join(schema.names)}"
        raise DataError(message, field=schema.names[0], cure="add a column for each, null where there is no rating")
    contents = _split_prompt(_text(row, "prompt"))
    prompt = tuple(
        Turn(ROLES[index % 2], _text({"prompt": content}, "prompt")) for index, content in enumerate(contents)
    )
    answer = Turn("assistant", _text(row, "response"), _ratings(rated, schema) or None)
    return Conversation(_checked_turns((*prompt, answer), "prompt"), _system(row))


def _split_prompt(prompt: str) -> list[str]:
    """HelpSteer2's `{user}\\n<extra_id_1>Assistant\\n{assistant}\\n<extra_id_1>User\\n{user}` as the turns' contents.

    A prompt whose markers do not alternate up to a user turn is text, and stays whole.
    """
    pieces = _PROMPT_MARKER.split(prompt)
    contents, roles = pieces[::2], pieces[1::2]
    return contents if roles == ["Assistant", "User"] * (len(roles) // 2) else [prompt]


def _from_regression(row: Row, schema: AttributeSchema) -> Conversation:
    system, turns = _parse_text(_text(row, "text"))
    label = _present(row, "label")
    if not isinstance(label, list) or len(label) != len(STEERLM):
        message = f"expected a list of {len(STEERLM)} numbers"
        raise DataError(message, field="label", cure=f"order: {', '.join(STEERLM.names)}; -100 where not rated")
    rated = {name: value for name, value in zip(STEERLM.names, label, strict=True) if value != _MISSING_LABEL}
    turns = (*turns[:-1], replace(turns[-1], ratings=_ratings(rated, schema, "label.") or None))
    return Conversation(_checked_turns(turns, "text"), system)


def _parse_text(text: str) -> tuple[str, tuple[Turn, ...]]:
    """The reference's rendered text as (system, turns), the last one the assistant's."""
    cure = "write <extra_id_0>System\\n..\\n<extra_id_1>User\\n..\\n<extra_id_1>Assistant\\n..\\n<extra_id_2>"
    if not text.startswith(_SYSTEM_START):
        raise DataError("does not begin with <extra_id_0>System", field="text", cure=cure)
    if not text.endswith(_TEXT_END):
        raise DataError("does not end with a line break and <extra_id_2>", field="text", cure=cure)
    system, *pieces = text[len(_SYSTEM_START) : -len(_TEXT_END)].split(_TURN_START)
    turns = []
    for piece in pieces:
        name, _, content = piece.partition("\n")
        if name not in ("User", "Assistant"):
            raise DataError(f"unknown role '{name}' after <extra_id_1>", field="text", cure=cure)
        turns.append(Turn(name.lower(), _text({"text": content}, "text")))
    if not turns or turns[-1].role != "assistant":
        raise DataError("the last turn is not the assistant's", field="text", cure=cure)
    return system, tuple(turns)


def _from_reference(row: Row, schema: AttributeSchema) -> Conversation:
    if row.get("type") not in _LABEL_TYPES:
        raise DataError(f"unknown type {row['type']!r}", field="type", cure="use VALUE_TO_TEXT, TEXT_TO_VALUE or null")
    roles = _reference_roles(row)
    turns = []
    for index, entry in enumerate(_entries(row, "conversations")):
        at = f"conversations[{index}]."
        _check_keys(entry, ("value", "from", "label", "canonical_form", "canoncial_form"), at)
        speaker = _text(entry, "from", at)
        if speaker.casefold() not in roles:
            cure = f"use one of: {', '.join(roles)}; the system text goes into 'system'"
            raise DataError(f"unknown role '{speaker}'", field=f"{at}from", cure=cure)
        ratings = _reference_label(entry.get("label"), schema, f"{at}label")
        turns.append(Turn(roles[speaker.casefold()], _text(entry, "value", at), ratings))
    return Conversation(_checked_turns(tuple(turns), "conversations[{}].from"), _system(row))


def _reference_roles(row: Row) -> dict[str, str]:
    """Casefolded speaker -> role. `mask` names whoever is not trained on, i.e. the user."""
    mask = row.get("mask")
    if mask is not None and not isinstance(mask, str):
        raise DataError(f"expected text, got {type(mask).__name__}", field="mask", cure='write "mask": "User"')
    masked = [name.strip().casefold() for name in (mask or "User").split(",")]
    if "assistant" in masked:
        raise DataError("masks the assistant, the side that is rated", field="mask", cure='write "mask": "User"')
    return {"user": "user", "assistant": "assistant"} | dict.fromkeys(masked, "user")


def _reference_label(label: object, schema: AttributeSchema, field: str) -> Mapping[str, float] | None:
    if label is None:
        return None
    if not isinstance(label, str):
        message = f"expected text or null, got {type(label).__name__}"
        raise DataError(message, field=field, cure="write e.g. helpfulness:4,correctness:3")
    with _inside(f"{field}."):
        return parse_label(label, schema) or None


def _from_conversation(row: Row, schema: AttributeSchema) -> Conversation:
    turns = []
    for index, entry in enumerate(_entries(row, "turns")):
        at = f"turns[{index}]."
        _check_keys(entry, ("role", "content", "ratings", "predicted_ratings"), at)
        role = _text(entry, "role", at)
        if role not in ROLES:
            cure = f"use {' or '.join(ROLES)}; the system text goes into 'system'"
            raise DataError(f"unknown role '{role}'", field=f"{at}role", cure=cure)
        ratings = _ratings(entry.get("ratings"), schema, f"{at}ratings.")
        predicted = _ratings(entry.get("predicted_ratings"), _unbounded(schema), f"{at}predicted_ratings.")
        turns.append(Turn(role, _text(entry, "content", at), ratings, predicted))
    name = _text(row, "id") if row.get("id") else ""
    return Conversation(_checked_turns(tuple(turns), "turns[{}].role"), _system(row), name)


FORMATS: dict[str, Callable[[Row, AttributeSchema], Conversation]] = {
    "helpsteer": _from_helpsteer,
    "regression": _from_regression,
    "reference": _from_reference,
    "conversation": _from_conversation,
}


# Checks that all formats share


@contextmanager
def _inside(prefix: str) -> Iterator[None]:
    """Prefixes the field of a DataError, e.g. with `turns[1].ratings.`."""
    try:
        yield
    except DataError as error:
        raise DataError(error.message, field=(prefix + error.field).rstrip("."), cure=error.cure) from None


def _present(row: Row, key: str, at: str = "") -> Any:
    if row.get(key) is None:
        raise DataError("missing", field=at + key, cure=f"add '{key}', or remove the row")
    return row[key]


def _text(row: Row, key: str, at: str = "") -> str:
    value = _present(row, key, at)
    _check_text(value, at + key)
    if not value.strip():
        raise DataError("empty", field=at + key, cure="fill it in, or remove the row")
    return value


def _system(row: Row) -> str | None:
    system = row.get("system")
    if system is not None:
        _check_text(system, "system")
    return system


def _check_text(value: object, field: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"expected text, got {type(value).__name__}", field=field, cure="write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        cure = "write the whole character; a lone half of a \\uD83D\\uDE00 pair is none"
        raise DataError("contains half a surrogate pair", field=field, cure=cure) from None


def _entries(row: Row, key: str) -> list[Row]:
    entries = _present(row, key)
    if not isinstance(entries, list) or not entries:
        raise DataError("expected a list of turns", field=key, cure="write at least one turn")
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            what = f"expected an object, got {type(entry).__name__}"
            raise DataError(what, field=f"{key}[{index}]", cure="write a turn as {...}")
    return entries


def _check_keys(entry: Row, known: tuple[str, ...], at: str) -> None:
    for key in entry:
        if key not in known:
            raise DataError("unknown key", field=f"{at}{key}", cure=f"use: {', '.join(known)}; or remove it")


def _ratings(value: object, schema: AttributeSchema, at: str = "") -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        message = f"expected an object of name to number, got {type(value).__name__}"
        raise DataError(message, field=at.rstrip("."), cure='write e.g. {"helpfulness": 4}')
    for name, rating in value.items():
        if rating is not None and name not in schema.names:
            having = [title for title, other in SCHEMAS.items() if name in other.names]
            cure = f"run with schema {' or '.join(having)}" if having else f"use one of: {', '.join(schema.names)}"
            raise DataError("the schema has no such attribute", field=at + name, cure=f"{cure}; or remove the rating")
    try:
        with _inside(at):
            return checked_ratings(value, schema, at)
    except OverflowError:  # an integer beyond a float's range
        raise DataError("a rating is too large", field=at.rstrip("."), cure="write numbers within the range") from None


def _unbounded(schema: AttributeSchema) -> AttributeSchema:
    """A regression head may predict a little outside the range, so a prediction need only be finite."""
    return AttributeSchema(tuple(replace(a, low=-math.inf, high=math.inf) for a in schema.attributes))


def _checked_turns(turns: tuple[Turn, ...], field: str) -> tuple[Turn, ...]:
    """The turns, if roles alternate from the user on and only the assistant is rated; `field` may hold the index."""
    for index, turn in enumerate(turns):
        expected = ROLES[index % 2]
        if turn.role != expected:
            message = f"roles must alternate, user first: expected {expected}, got {turn.role}"
            raise DataError(message, field=field.format(index), cure="merge turns of one side, or remove the row")
        if turn.role == "user" and (turn.ratings or turn.predicted_ratings):
            cure = "rate the assistant's turn that answers it"
            raise DataError("a user turn is rated", field=field.format(index), cure=cure)
    return turns
