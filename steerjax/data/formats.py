"""One row of any format -> a `Conversation`, with every check that needs no file.

The formats: docs/formats.md; NeMo-Aligner `examples/nlp/data/steerlm/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from steerjax.data.checks import (
    Row,
    check_keys,
    check_text,
    checked_turns,
    entries_of,
    inside,
    present,
    ratings_of,
    system_of,
    text_of,
    unbounded,
)
from steerjax.data.conversation import ROLES, Conversation, Turn
from steerjax.errors import ConfigError, DataError
from steerjax.schema import STEERLM, Schema, check_rating, parse_label

_MISSING_LABEL = -100  # the regression format's "not rated"
_SYSTEM_START, _TURN_START, _TEXT_END = "<extra_id_0>System\n", "\n<extra_id_1>", "\n<extra_id_2>"
_PROMPT_MARKER = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
_LABEL_TYPES = ("VALUE_TO_TEXT", "TEXT_TO_VALUE", None)  # where the reference writes the label; all mean the same here
_SPEAKERS = {  # ShareGPT's, casefolded
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}


def conversation_from_row(row: Row, schema: Schema, format: str = "auto") -> Conversation:
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
    "messages": {"messages"},
    "alpaca": {"instruction"},
}


def _detect_format(row: Row) -> str:
    found = [name for name, keys in _TELLING_KEYS.items() if keys & row.keys()]
    if len(found) == 1:
        return "sharegpt" if found == ["reference"] and _is_sharegpt(row) else found[0]
    what = f"the row could be any of: {', '.join(found)}" if found else f"unknown format with keys {list(row)}"
    raise DataError(what, cure=f"set format to one of: {', '.join(FORMATS)} (docs/formats.md)")


def _from_helpsteer(row: Row, schema: Schema) -> Conversation:
    rated = {name: _mean_rating(row[name], schema, name) for name in schema.names if name in row}
    if not rated:
        message = f"no attribute of the schema is there: {', '.join(schema.names)}"
        raise DataError(message, field=schema.names[0], cure="add a column for each, null where there is no rating")
    prompt = prompt_turns(row)
    answer = Turn("assistant", text_of(row, "response"), ratings_of(rated, schema) or None)
    return Conversation(checked_turns((*prompt, answer), "prompt"), system_of(row))


def prompt_turns(row: Row) -> tuple[Turn, ...]:
    """HelpSteer2's `{user}\\n<extra_id_1>Assistant\\n{assistant}\\n<extra_id_1>User\\n{user}` as turns.

    A prompt whose markers do not alternate up to a user turn is text, and stays whole.
    """
    prompt = text_of(row, "prompt")
    pieces = _PROMPT_MARKER.split(prompt)
    contents, roles = pieces[::2], pieces[1::2]
    if roles != ["Assistant", "User"] * (len(roles) // 2):
        contents = [prompt]
    return tuple(Turn(ROLES[i % 2], text_of({"prompt": content}, "prompt")) for i, content in enumerate(contents))


def _mean_rating(value: object, schema: Schema, name: str) -> object:
    """HelpSteer2's `disagreements` list the raters' numbers; the rating is their mean."""
    if not isinstance(value, list):
        return value
    if not value:
        raise DataError("an empty list of ratings", field=name, cure="write null where there is no rating")
    return sum(check_rating(entry, schema[name]) for entry in value) / len(value)


def _from_regression(row: Row, schema: Schema) -> Conversation:
    system, turns = _parse_text(text_of(row, "text"))
    label = present(row, "label")
    if not isinstance(label, list) or len(label) != len(STEERLM):
        message = f"expected a list of {len(STEERLM)} numbers"
        raise DataError(message, field="label", cure=f"order: {', '.join(STEERLM.names)}; -100 where not rated")
    rated = {name: value for name, value in zip(STEERLM.names, label, strict=True) if value != _MISSING_LABEL}
    turns = (*turns[:-1], replace(turns[-1], ratings=ratings_of(rated, schema, "label.") or None))
    return Conversation(checked_turns(turns, "text"), system)


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
        turns.append(Turn(name.lower(), text_of({"text": content}, "text")))
    if not turns or turns[-1].role != "assistant":
        raise DataError("the last turn is not the assistant's", field="text", cure=cure)
    return system, tuple(turns)


def _from_reference(row: Row, schema: Schema) -> Conversation:
    if row.get("type") not in _LABEL_TYPES:
        raise DataError(f"unknown type {row['type']!r}", field="type", cure="use VALUE_TO_TEXT, TEXT_TO_VALUE or null")
    roles = _reference_roles(row)
    turns = []
    for index, entry in enumerate(entries_of(row, "conversations")):
        at = f"conversations[{index}]."
        check_keys(entry, ("value", "from", "label", "canonical_form", "canoncial_form"), at)
        speaker = text_of(entry, "from", at)
        if speaker.casefold() not in roles:
            cure = f"use one of: {', '.join(roles)}; the system text goes into 'system'"
            raise DataError(f"unknown role '{speaker}'", field=f"{at}from", cure=cure)
        ratings = _reference_label(entry.get("label"), schema, f"{at}label")
        turns.append(Turn(roles[speaker.casefold()], text_of(entry, "value", at), ratings))
    return Conversation(checked_turns(tuple(turns), "conversations[{}].from"), system_of(row))


def _reference_roles(row: Row) -> dict[str, str]:
    """Casefolded speaker -> role. `mask` names whoever is not trained on, i.e. the user."""
    mask = row.get("mask")
    if mask is not None and not isinstance(mask, str):
        raise DataError(f"expected text, got {type(mask).__name__}", field="mask", cure='write "mask": "User"')
    masked = [name.strip().casefold() for name in (mask or "User").split(",")]
    if "assistant" in masked:
        raise DataError("masks the assistant, the side that is rated", field="mask", cure='write "mask": "User"')
    return {"user": "user", "assistant": "assistant"} | dict.fromkeys(masked, "user")


def _reference_label(label: object, schema: Schema, field: str) -> Mapping[str, float] | None:
    if label is None:
        return None
    if not isinstance(label, str):
        message = f"expected text or null, got {type(label).__name__}"
        raise DataError(message, field=field, cure="write e.g. helpfulness:4,correctness:3")
    with inside(f"{field}."):
        return parse_label(label, schema) or None


def _from_conversation(row: Row, schema: Schema) -> Conversation:
    turns = []
    for index, entry in enumerate(entries_of(row, "turns")):
        at = f"turns[{index}]."
        check_keys(entry, ("role", "content", "ratings", "predicted_ratings", "predicted_label"), at)
        role = text_of(entry, "role", at)
        if role not in ROLES:
            cure = f"use {' or '.join(ROLES)}; the system text goes into 'system'"
            raise DataError(f"unknown role '{role}'", field=f"{at}role", cure=cure)
        ratings = ratings_of(entry.get("ratings"), schema, f"{at}ratings.")
        predicted = ratings_of(entry.get("predicted_ratings"), unbounded(schema), f"{at}predicted_ratings.")
        turns.append(Turn(role, text_of(entry, "content", at), ratings, predicted))
    name = text_of(row, "id") if row.get("id") else ""
    return Conversation(checked_turns(tuple(turns), "turns[{}].role"), system_of(row), name)


def _from_messages(row: Row, schema: Schema) -> Conversation:
    system, turns = message_turns(row, "messages")
    return Conversation(turns, system, _name(row))


def message_turns(row: Row, key: str) -> tuple[str | None, tuple[Turn, ...]]:
    """(system, turns) of a list of OpenAI's `{"role": ..., "content": ...}`."""
    roles = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
    return _chat_turns(row, key, "role", "content", roles)


def _from_sharegpt(row: Row, schema: Schema) -> Conversation:
    system, turns = _chat_turns(row, "conversations", "from", "value", _SPEAKERS)
    return Conversation(turns, system, _name(row))


def _is_sharegpt(row: Row) -> bool:
    """Whether `conversations` has ShareGPT's speakers: a name that the reference would have to list in `mask`."""
    entries = row["conversations"]
    if row.get("mask") is not None or not isinstance(entries, list):
        return False
    speakers = {str(entry.get("from")).casefold() for entry in entries if isinstance(entry, Mapping)}
    return bool(speakers & (_SPEAKERS.keys() - {"user", "assistant"}))


# Keys of a message that change what it means, so that it cannot be read without them.
_MEANINGFUL = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), "tool use is not implemented; remove the row"),
    **dict.fromkeys(("ratings", "predicted_ratings", "label"), "ratings stand in the format 'conversation'"),
    "weight": "turns are not masked one by one; remove it, or the row",
}


def _chat_turns(
    row: Row, key: str, role_key: str, content_key: str, roles: Mapping[str, str]
) -> tuple[str | None, tuple[Turn, ...]]:
    """(system, turns) of a list of messages, of which the first may be the system text."""
    system, turns = system_of(row), []
    for index, entry in enumerate(entries_of(row, key)):
        at = f"{key}[{index}]."
        for name, cure in _MEANINGFUL.items():
            if entry.get(name) not in (None, [], {}, "") and not (name == "weight" and entry[name] == 1):
                raise DataError("cannot be left out of account", field=at + name, cure=cure)
        speaker = text_of(entry, role_key, at)
        role = roles.get(speaker.casefold())
        if role is None:
            raise DataError(f"unknown role '{speaker}'", field=at + role_key, cure=f"use one of: {', '.join(roles)}")
        if role != "system":
            turns.append(Turn(role, text_of({content_key: _joined_parts(entry, content_key, at)}, content_key, at)))
            continue
        text = _joined_parts(entry, content_key, at)
        check_text(text, at + content_key)
        if index or system not in (None, text):
            what = "a system text in the middle" if index else "the row has two system texts"
            raise DataError(what, field=at + role_key, cure="put one system text first, or remove the row")
        system = text
    if not turns:
        raise DataError("no turn beside the system text", field=key, cure="remove the row")
    return system, checked_turns(tuple(turns), key + "[{}]." + role_key)


def _joined_parts(entry: Row, key: str, at: str) -> object:
    """A content that is a list of `{"type": "text", "text": ...}` as one text."""
    content = present(entry, key, at)
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        where = f"{at}{key}[{index}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError("a part that is no text", field=where, cure="images and audio are not read; remove the row")
        check_text(part.get("text"), f"{where}.text")
        texts.append(part["text"])
    return "".join(texts)


def _from_alpaca(row: Row, schema: Schema) -> Conversation:
    """Instruction and input are joined by a line break, as LLaMA-Factory does; `history` comes before them."""
    question = text_of(row, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n" + text_of(row, "input")
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise DataError("expected a list of [question, answer]", field="history", cure="write pairs, or remove it")
    contents = [*(content for pair in history for content in pair), question, text_of(row, "output")]
    turns = tuple(Turn(ROLES[i % 2], text_of({"history": content}, "history")) for i, content in enumerate(contents))
    return Conversation(turns, system_of(row) or None, _name(row))


def _name(row: Row) -> str:
    """The row's `id`; dumps number their rows."""
    name = row.get("id")
    return str(name) if isinstance(name, int) else text_of(row, "id") if name else ""


FORMATS: dict[str, Callable[[Row, Schema], Conversation]] = {
    "helpsteer": _from_helpsteer,
    "regression": _from_regression,
    "reference": _from_reference,
    "conversation": _from_conversation,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
}
