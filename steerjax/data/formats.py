"""One row of any format -> a `Conversation`, with every check that needs no file.

The formats: docs/formats.md; NeMo-Aligner `examples/nlp/data/steerlm/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from steerjax.attributes import SCHEMAS, STEERLM, AttributeSchema, parse_label
from steerjax.data.conversation import ROLES, Conversation, Turn, checked_ratings
from steerjax.errors import ConfigError, DataError

Row = dict[str, Any]

_MISSING_LABEL = -100  # the regression format's "not rated"
_SYSTEM_START, _TURN_START, _TEXT_END = "<extra_id_0>System\n", "\n<extra_id_1>", "\n<extra_id_2>"
_PROMPT_MARKER = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
_LABEL_TYPES = ("VALUE_TO_TEXT", "TEXT_TO_VALUE", None)  # where the reference writes the label; all mean the same here


def conversation_from_row(row: Row, schema: AttributeSchema, format: str = "auto") -> Conversation:
    """One row as a conversation; `format` is a key of `FORMATS`, or "auto" to tell it from the row's keys.

    Raises:
        DataError: the row cannot be used; names the field. ConfigError: unknown format.
    """
    check_format(format)
    return FORMATS[_detect_format(row) if format == "auto" else format](row, schema)


def check_format(format: str) -> None:
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
