"""The checks of a row's fields that all formats share. A DataError names the field and the cure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from steerjax.data.conversation import ROLES, Turn, checked_ratings
from steerjax.errors import DataError
from steerjax.schema import SCHEMAS, Schema

Row = dict[str, Any]


@contextmanager
def inside(prefix: str) -> Iterator[None]:
    """Prefixes the field of a DataError, e.g. with `turns[1].ratings.`."""
    try:
        yield
    except DataError as error:
        raise DataError(error.message, field=(prefix + error.field).rstrip("."), cure=error.cure) from None


def present(row: Row, key: str, at: str = "") -> Any:
    """The value of a key; `at` is what stands before the key in messages. Null is missing."""
    if row.get(key) is None:
        raise DataError("missing", field=at + key, cure=f"add '{key}', or remove the row")
    return row[key]


def text_of(row: Row, key: str, at: str = "") -> str:
    """The text of a key: there, a string, not blank."""
    value = present(row, key, at)
    check_text(value, at + key)
    if not value.strip():
        raise DataError("empty", field=at + key, cure="fill it in, or remove the row")
    return value


def system_of(row: Row) -> str | None:
    """The row's system text, None where there is none."""
    system = row.get("system")
    if system is not None:
        check_text(system, "system")
    return system


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


def check_keys(entry: Row, known: tuple[str, ...], at: str) -> None:
    """Refuses keys that are not known."""
    for key in entry:
        if key not in known:
            raise DataError("unknown key", field=f"{at}{key}", cure=f"use: {', '.join(known)}; or remove it")


def ratings_of(value: object, schema: Schema, at: str = "") -> dict[str, float] | None:
    """Ratings by name, each of the schema and in its range; null ratings are missing ones."""
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
        with inside(at):
            return checked_ratings(value, schema, at)
    except OverflowError:  # an integer beyond a float's range
        raise DataError("a rating is too large", field=at.rstrip("."), cure="write numbers within the range") from None


def unbounded(schema: Schema) -> Schema:
    """A regression head may predict a little outside the range, so a prediction need only be finite."""
    return Schema(tuple(replace(a, low=-math.inf, high=math.inf) for a in schema.attributes))


def checked_turns(turns: tuple[Turn, ...], field: str) -> tuple[Turn, ...]:
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
