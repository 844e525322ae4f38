"""The checks of a row's fields that all formats share. A DataError names the field and the cure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from steerjax.errors import DataError

Row = dict[str, Any]


@contextmanager
def inside(prefix: str) -> Iterator[None]:
    """Prefixes the field of a DataError, e.g. with `turns[1].ratings.`."""
    try:
        yield
    except DataError as error:
        raise DataError(error.message, field=(prefix + error.field).rstrip("."), cure=error.cure) from None
    except OverflowError:  # an integer beyond a float's range
        raise DataError("a rating is too large", field=prefix.rstrip("."), cure="write numbers of the range") from None


def present(row: Row, key: str) -> Any:
    """The value of a key; null is missing."""
    if row.get(key) is None:
        raise DataError("missing", field=key, cure=f"add '{key}', or remove the row")
    return row[key]


def text_of(row: Row, key: str) -> str:
    """The text of a key: there, a string, not blank."""
    value = present(row, key)
    check_text(value, key)
    if not value.strip():
        raise DataError("empty", field=key, cure="fill it in, or remove the row")
    return value


def system_of(row: Row) -> str | None:
    """The row's system text, None where there is none."""
    system = row.get("system")
    if system is not None:
        check_text(system, "system")
    return system


def name_of(row: Row) -> str:
    """The row's or turn's `id`, "" where there is none; dumps number theirs."""
    name = row.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    return text_of(row, "id") if name else ""


def check_text(value: object, field: str) -> None:
    """Refuses what is no string, or no whole Unicode text."""
    if not isinstance(value, str):
        raise DataError(f"expected text, got {type(value).__name__}", field=field, cure="write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        cure = "write the whole character; a lone half of a \\uD83D\\uDE00 pair is none"
        raise DataError("contains half a surrogate pair", field=field, cure=cure) from None


def entries_of(row: Row, key: str) -> list[Row]:
    """The list of objects under a key, at least one."""
    entries = present(row, key)
    if not isinstance(entries, list) or not entries:
        raise DataError("expected a list of turns", field=key, cure="write at least one turn")
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            what = f"expected an object, got {type(entry).__name__}"
            raise DataError(what, field=f"{key}[{index}]", cure="write a turn as {...}")
    return entries
