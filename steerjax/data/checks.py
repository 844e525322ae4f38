"""The checks that all formats share. A DataError names the field and the cure."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from steerjax.data.conversation import Turn
from steerjax.errors import DataError
from steerjax.schema import SCHEMAS, Schema, check_rating

Row = dict[str, Any]

_KINDS = {str: "text", list: "a list", dict: "an object"}


@contextmanager
def inside(prefix: str) -> Iterator[None]:
    """Prefixes the field of a DataError, e.g. with `turns[1].ratings.`."""
    try:
        yield
    except DataError as error:
        raise error.but(field=(prefix + error.field).rstrip(".")) from None


def check_kind(kind: type, value: object, field: str) -> None:
    """Refuses what is no `kind` (str, list or dict), or no whole Unicode text."""
    if not isinstance(value, kind):
        what = f"expected {_KINDS[kind]}, got {type(value).__name__}"
        raise DataError(what, field, f"write {_KINDS[kind]} (docs/formats.md)")
    try:
        if kind is str:
            value.encode("utf-8")
    except UnicodeEncodeError:
        cure = "write the whole character; a lone half of a \\uD83D\\uDE00 pair is none"
        raise DataError("contains half a surrogate pair", field, cure) from None


check_text = functools.partial(check_kind, str)


def value_of(row: Row, key: str, kind: type, *default: Any) -> Any:
    """The value of a key, a `kind`; null is missing, and refused unless there is a default."""
    value = row.get(key)
    if value is None and not default:
        raise DataError("missing", key, f"add '{key}', or remove the row")
    if value is None:
        return default[0]
    check_kind(kind, value, key)
    return value


def text_of(row: Row, key: str) -> str:
    """The text of a key, not blank."""
    text = value_of(row, key, str)
    if not text.strip():
        raise DataError("empty", key, "fill it in, or remove the row")
    return text


def name_of(row: Row) -> str:
    """The `id` of a row or turn, "" where there is none; dumps number theirs."""
    name = row.get("id")
    return str(name) if type(name) is int else value_of(row, "id", str, "")


def checked_ratings(ratings: Mapping[str, object], schema: Schema) -> dict[str, float] | None:
    """Ratings by name, each of the schema and in its range; null is a missing rating."""
    given = {name: value for name, value in ratings.items() if value is not None}
    check_names(given, schema)
    return {name: check_rating(value, schema[name]) for name, value in given.items()} or None


def check_names(names: Collection[str], schema: Schema) -> None:
    """Refuses names outside the schema; the cure names the preset that has them."""
    if unknown := [name for name in names if name not in schema.names]:
        having = [title for title, preset in SCHEMAS.items() if set(names) <= set(preset.names)]
        cure = f"take the schema {' or '.join(having)} (data.schema)" if having else "add it to data.attributes"
        raise DataError("the schema has no such attribute", unknown[0], f"{cure}; or remove the rating")


def check_turns(turns: Sequence[Turn], field: str) -> None:
    """Refuses turns that do not alternate after a system text, and ratings of the user."""
    for index, turn in enumerate(turns):
        if index and turn.role in ("system", turns[index - 1].role):
            message = f"{turn.role} after {turns[index - 1].role}: roles must alternate, a system text stands first"
            raise DataError(message, f"{field}[{index}]", "merge turns of one side, or remove the row")
        if turn.role == "user" and (turn.ratings or turn.predicted_ratings):
            cure = "rate the assistant's turn that answers it"
            raise DataError("a user turn is rated", f"{field}[{index}]", cure)
