"""One row of any format -> a `Conversation`, with every check that needs no file.

The formats: docs/formats.md; NeMo-Aligner `examples/nlp/data/steerlm/`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from steerjax.data.checks import Row, check_text, entries_of, inside, name_of, present, system_of, text_of
from steerjax.data.conversation import ROLES, Conversation, Turn, check_names, checked_ratings, checked_turns
from steerjax.errors import ConfigError, DataError
from steerjax.schema import STEERLM, Attribute, Schema, check_rating, parse_label

_MISSING_LABEL = -100  # the regression format's "not rated"
_TURN_START = "\n<extra_id_1>"
_RENDERED = re.compile(r"<extra_id_0>System\n(.*?)(\n<extra_id_1>.*)\n<extra_id_2>", re.DOTALL)
_PROMPT_MARKER = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
_SPEAKERS = {  # ShareGPT's, casefolded
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}
_REFERENCE_KEYS = ("value", "from", "label", "canonical_form", "canoncial_form")
_OWN_KEYS = ("role", "content", "ratings", "predicted_ratings", "predicted_label", "id")
_TOOLS = ("tool_calls", "function_call", "tool_call_id")
_OPENAI_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def conversation_from_row(row: Row, schema: Schema, format: str = "auto") -> Conversation:
    """One row as a conversation; `format` is a key of `FORMATS`, or "auto" to tell it from the row's keys.

    Raises:
        DataError: the row cannot be used; names the field. ConfigError: unknown format.
    """
    check_format(format)
    conversation = FORMATS[_detect_format(row) if format == "auto" else format](row, schema)
    return replace(conversation, id=name_of(row))


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
        return "sharegpt" if found == ["reference"] and not _is_reference(row) else found[0]
    what = f"the row could be any of: {', '.join(found)}" if found else f"unknown format with keys {list(row)}"
    raise DataError(what, cure=f"set format to one of: {', '.join(FORMATS)} (docs/formats.md)")


def _is_reference(row: Row) -> bool:
    """Whether `conversations` is NeMo-Aligner's, which names the user's side or labels a turn, and not ShareGPT's."""
    entries = row["conversations"]
    labelled = isinstance(entries, list) and any(isinstance(e, Mapping) and "label" in e for e in entries)
    return labelled or "mask" in row


def _from_helpsteer(row: Row, schema: Schema) -> Conversation:
    return _answered(row, schema, (Turn("user", text_of(row, "prompt")),))


def _from_helpsteer2(row: Row, schema: Schema) -> Conversation:
    return _answered(row, schema, prompt_turns(row))


def _answered(row: Row, schema: Schema, prompt: tuple[Turn, ...]) -> Conversation:
    response, rated = text_of(row, "response"), _columns(row, schema)
    if rated is None:
        cure = "name the columns that are rated in data.attributes, or take the preset that has them (data.schema)"
        message = f"no attribute of the schema is there: {', '.join(schema.names)}"
        raise DataError(message, field=schema.names[0], cure=cure)
    return Conversation((*prompt, Turn("assistant", response, rated or None)), system_of(row))


def _columns(row: Row, schema: Schema) -> dict[str, float] | None:
    """The row's ratings, in columns of the attributes' names; None where it has no such column."""
    columns = {a.name: _mean_rating(row[a.name], a) for a in schema.attributes if a.name in row}
    return checked_ratings(columns, schema, "") if columns else None


def _mean_rating(value: object, attribute: Attribute) -> object:
    """HelpSteer2's `disagreements` list the raters' numbers; the rating is their mean."""
    if not isinstance(value, list):
        return value
    if not value:
        raise DataError("an empty list of ratings", field=attribute.name, cure="write null where there is no rating")
    return sum(check_rating(entry, attribute) for entry in value) / len(value)


def prompt_turns(row: Row) -> tuple[Turn, ...]:
    """HelpSteer2's `{user}\\n<extra_id_1>Assistant\\n{assistant}\\n<extra_id_1>User\\n{user}` as turns.

    A prompt whose markers do not alternate up to a user turn is text, and stays whole.
    """
    return _marked_turns(text_of(row, "prompt"), "prompt")


def _marked_turns(text: str, field: str) -> tuple[Turn, ...]:
    pieces = _PROMPT_MARKER.split(text)
    contents, roles = pieces[::2], pieces[1::2]
    if roles != ["Assistant", "User"] * (len(roles) // 2):
        contents = [text]
    return tuple(Turn(ROLES[i % 2], text_of({field: content}, field)) for i, content in enumerate(contents))


def _from_regression(row: Row, schema: Schema) -> Conversation:
    system, turns = _parse_text(text_of(row, "text"))
    label = present(row, "label")
    if not isinstance(label, list) or len(label) != len(STEERLM):
        message = f"expected a list of {len(STEERLM)} numbers"
        raise DataError(message, field="label", cure=f"order: {', '.join(STEERLM.names)}; -100 where not rated")
    rated = {name: value for name, value in zip(STEERLM.names, label, strict=True) if value != _MISSING_LABEL}
    turns[-1] = replace(turns[-1], ratings=checked_ratings(rated, schema, "label") or None)
    return Conversation(checked_turns(tuple(turns), "text"), system)


def _parse_text(text: str) -> tuple[str, list[Turn]]:
    """The reference's rendered text as (system, turns), the last one the assistant's."""
    rendered = _RENDERED.fullmatch(text)
    pieces = [piece.partition("\n") for piece in rendered[2].split(_TURN_START)[1:]] if rendered else []
    speakers = [speaker for speaker, _, _ in pieces]
    if speakers[-1:] != ["Assistant"] or set(speakers) - {"User", "Assistant"}:
        what = "is no text of the reference, from <extra_id_0>System to <extra_id_2>, that ends with the Assistant"
        cure = "write <extra_id_0>System\\n..\\n<extra_id_1>User\\n..\\n<extra_id_1>Assistant\\n..\\n<extra_id_2>"
        raise DataError(what, field="text", cure=cure)
    return rendered[1], [Turn(name.lower(), text_of({"text": content}, "text")) for name, _, content in pieces]


def _from_reference(row: Row, schema: Schema) -> Conversation:
    """Markers in a user's text are HelpSteer2's, which the reference's conversion leaves in place."""
    mask = row.get("mask") or "User"  # names whoever is not trained on, i.e. the user
    check_text(mask, "mask")
    masked = [name.strip().casefold() for name in mask.split(",")]
    if "assistant" in masked:
        raise DataError("masks the assistant, the side that is rated", field="mask", cure='write "mask": "User"')
    roles = {"user": "user", "assistant": "assistant"} | dict.fromkeys(masked, "user")
    whole = _dialogue(row, schema, "conversations", "from", "value", roles, _REFERENCE_KEYS)
    turns = (_marked_turns(turn.content, "value") if turn.role == "user" else (turn,) for turn in whole.turns)
    return replace(whole, turns=tuple(itertools.chain.from_iterable(turns)))


def _from_conversation(row: Row, schema: Schema) -> Conversation:
    return _dialogue(row, schema, "turns", "role", "content", dict(zip(ROLES, ROLES, strict=True)), _OWN_KEYS)


def _from_messages(row: Row, schema: Schema) -> Conversation:
    """Ratings in the row's columns belong to the last assistant turn."""
    conversation, rated = _dialogue(row, schema, "messages", "role", "content", _OPENAI_ROLES), _columns(row, schema)
    if not rated:
        return conversation
    turns = list(conversation.turns)
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None or turns[last].ratings:
        what = "no assistant turn is there that is rated" if last is None else "the last assistant turn is rated twice"
        raise DataError(what, field="messages", cure="rate the last assistant turn, beside the messages or in it")
    turns[last] = replace(turns[last], ratings=rated)
    return replace(conversation, turns=tuple(turns))


def _from_sharegpt(row: Row, schema: Schema) -> Conversation:
    return _dialogue(row, schema, "conversations", "from", "value", _SPEAKERS)


def _dialogue(
    row: Row, schema: Schema, key: str, role_key: str, content_key: str, roles: Mapping[str, str],
    known: tuple[str, ...] = (),
) -> Conversation:  # fmt: skip
    """The conversation of a list of turns, of which the first may be the system text.

    Args:
        roles: casefolded speaker -> role, or "system".
        known: the keys of a turn, where others are refused.
    """
    system, turns = system_of(row), []
    for index, entry in enumerate(entries_of(row, key)):
        with inside(f"{key}[{index}]."):
            _check_keys(entry, known)
            speaker, text = text_of(entry, role_key), _joined_parts(entry, content_key)
            role = roles.get(speaker.casefold())
            if role is None:
                cure = f"use one of: {', '.join(roles)}; a system text may stand in the row, under 'system'"
                raise DataError(f"unknown role '{speaker}'", field=role_key, cure=cure)
            if role != "system":
                text = text_of({content_key: text}, content_key)
                ratings = _label(entry.get("label"), schema)
                ratings = ratings or checked_ratings(entry.get("ratings"), schema, "ratings")
                predicted = checked_ratings(entry.get("predicted_ratings"), _finite(schema), "predicted_ratings")
                turns.append(Turn(role, text, ratings, predicted, name_of(entry) if "id" in known else ""))
                continue
            check_text(text, content_key)
            if index or system not in (None, text):
                what = "a system text in the middle" if index else "the row has two system texts"
                raise DataError(what, field=role_key, cure="put one system text first, or remove the row")
            system = text
    if not turns:
        raise DataError("no turn beside the system text", field=key, cure="remove the row")
    return Conversation(checked_turns(tuple(turns), f"{key}[{{}}].{role_key}"), system)


@functools.cache
def _finite(schema: Schema) -> Schema:
    """A regression head may predict a little outside the range, so a prediction need only be a number."""
    return Schema(tuple(replace(a, low=-1e30, high=1e30) for a in schema.attributes))


def _label(label: object, schema: Schema) -> Mapping[str, float] | None:
    """The reference's `helpfulness:4,correctness:3`."""
    if label is None:
        return None
    check_text(label, "label")
    with inside("label."):
        check_names([entry.partition(":")[0].strip() for entry in label.split(",") if ":" in entry], schema)
        return parse_label(label, schema) or None


def _check_keys(entry: Row, known: tuple[str, ...]) -> None:
    """Refuses keys that are not known; where any is, those that change what the turn means."""
    for key, value in entry.items():
        if known and key not in known:
            raise DataError("unknown key", field=key, cure=f"use: {', '.join(known)}; or remove it")
        if (key in _TOOLS and value) or (key == "weight" and value not in (None, 1)):
            cure = "tool use and masks of single turns are not implemented; remove it, or the row"
            raise DataError("cannot be left out of account", field=key, cure=cure)


def _joined_parts(entry: Row, key: str) -> object:
    """A content that is a list of `{"type": "text", "text": ...}` as one text."""
    content = present(entry, key)
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            cure = "images and audio are not read; remove the row"
            raise DataError("a part that is no text", field=f"{key}[{index}]", cure=cure)
        check_text(part.get("text"), f"{key}[{index}].text")
    return "".join(part["text"] for part in content)


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
    return Conversation(turns, system_of(row) or None)


FORMATS: dict[str, Callable[[Row, Schema], Conversation]] = {
    "helpsteer": _from_helpsteer,
    "helpsteer2": _from_helpsteer2,
    "regression": _from_regression,
    "reference": _from_reference,
    "conversation": _from_conversation,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
}
