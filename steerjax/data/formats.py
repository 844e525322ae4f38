"""One row of any format (docs/formats.md) -> a `Conversation`, with every check that needs no file."""

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from steerjax.data.conversation import LOG_PROBABILITIES, ROLES, Conversation, Sample, Turn
from steerjax.errors import ConfigError, DataError
from steerjax.schema import SCHEMAS, Schema, check_rating, parse_label

JsonRow = dict[str, Any]

_HH = re.compile(r"\n\n(Human|Assistant):")
_MARKER = re.compile(r"\n<extra_id_1>(Assistant|User)\n")
_SPEAKERS = {  # casefolded
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_OWN_KEYS = {"role", "content", "ratings", "predicted_ratings", "predicted_label", "id"}
_KINDS = {str: "text", list: "a list", dict: "an object"}
_NAMED = "data.attributes or data.schema in training, --attribute or --schema in prepare and collect"
_UNREAD = {"tool_calls", "function_call", "tool_call_id", "weight"}  # would change what a turn means


def conversation_from_row(row: JsonRow, schema: Schema, format: str = "auto", *, rated: bool = True) -> Conversation:
    """One row as a conversation; where it is not `rated`, a response needs no column of an attribute.

    Raises DataError: names the field. ConfigError: `format` is neither "auto" nor in `FORMATS`.
    """
    if format not in ("auto", *FORMATS, *PAIRS):
        raise ConfigError(f"unknown format '{format}'; cure: one of auto, {', '.join((*FORMATS, *PAIRS))}")
    pair, system = pair_of(row, schema, format), value_of(row, "system", str, None)
    if pair:
        key, (turns, rejected, strength) = "chosen", pair
    else:
        format = _detect_format(row) if format == "auto" else format
        key, read = FORMATS[format]
        turns, rejected, strength = read(row, schema, key), [], 1.0
        if key not in ("turns", "prompt_turns"):  # whose other keys pass through
            _rate_last(turns, row, schema, key)
        pair = key == "turns" and row.get("rejected") is not None  # null, as Parquet has for rows of another kind
        if pair:
            rejected, strength = read_dialogue(row, schema, "rejected"), _number(row, "strength", 1.0)
    for side, field in ((turns, key), (rejected, "rejected")):
        check_turns(side, field)
        if side and side[0].role == "system":
            if system not in (None, side[0].content):
                raise DataError("two system texts", f"{field}[0]", "keep one, or remove the row")
            system = side.pop(0).content
    if not turns:
        raise DataError("no turn beside a system text", key, "write at least one turn, or remove the row")
    if rated and key == "prompt" and not row.keys() & set(schema.names):
        columns = ", ".join(unread_numbers(row, schema))
        cure = f"call the rated columns{columns and f' ({columns}?)'} so; or say what they are called: {_NAMED}"
        raise DataError(f"no attribute of the schema: {', '.join(schema.names)}", schema.names[0], cure)
    if format == "alpaca":
        system = system or None  # its rows have "" where there is none
    if pair:
        _check_pair(turns, rejected, strength)
    asked, samples = _sampled(row, schema, turns) if key == "prompt_turns" else ({}, ())
    return Conversation(
        tuple(turns), system, name_of(row), rejected=tuple(rejected), strength=strength, asked=asked, samples=samples
    )


def _detect_format(row: JsonRow) -> str:
    keys = row.keys() | {"prompt"} if "response" in row else row.keys()
    keys = keys - {"completion" if "response" in row else "prompt"} if "completion" in keys else keys
    names = [name for name, (key, _) in FORMATS.items() if key in keys and name not in ("helpsteer2", "sharegpt")]
    if len(names) != 1:
        if names:
            cure = f"set format to one of: {', '.join(names)} (docs/formats.md)"
            raise DataError(f"the row could be any of: {', '.join(names)}", cure=cure)
        cure = "name keys as a format has them: prompt and response, messages, turns; of pairs chosen and rejected"
        raise DataError(f"unknown format with keys {list(row)}", cure=f"{cure} (docs/formats.md)")
    if names == ["reference"] and "mask" not in row:
        labelled = any("label" in turn for turn in value_of(row, "conversations", list) if isinstance(turn, dict))
        return "reference" if labelled else "sharegpt"
    return names[0]


def _helpsteer(row: JsonRow, schema: Schema, key: str) -> list[Turn]:
    return [Turn("user", text_of(row, key)), Turn("assistant", text_of(row, "response"))]


def _helpsteer2(row: JsonRow, schema: Schema, key: str) -> list[Turn]:
    return [*prompt_turns(row, key), *_helpsteer(row, schema, key)[1:]]


def _rate_last(turns: list[Turn], row: JsonRow, schema: Schema, key: str) -> None:
    """Ratings in the row's columns, or its `ratings`, belong to the last assistant turn."""
    columns, more = _columns(row, schema), _ratings(row, "ratings", schema)
    if rated := {**(columns or {}), **(more or {})}:
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        if last is None:
            raise DataError("ratings, and no assistant turn", key, "add the response they belong to, or remove them")
        if turns[last].ratings or (columns and more):
            raise DataError("the last assistant turn is rated twice", key, "rate it beside the turns or in it")
        turns[last] = replace(turns[last], ratings=rated)


def _columns(row: JsonRow, schema: Schema) -> dict[str, float] | None:
    """Ratings in columns of the attributes' names; a list (HelpSteer2's `disagreements`) counts as its mean."""
    columns = {attribute.name: row.get(attribute.name) for attribute in schema.attributes}
    for name, value in columns.items():
        if isinstance(value, list) and value:
            columns[name] = sum(check_rating(entry, schema[name]) for entry in value) / len(value)
    return _checked(columns, schema)


def prompt_turns(row: JsonRow, key: str = "prompt") -> tuple[Turn, ...]:
    """HelpSteer2's `{user}\\n<extra_id_1>Assistant\\n{assistant}\\n<extra_id_1>User\\n{user}` as turns.

    A text whose markers do not alternate up to a user turn stays whole.
    """
    text = text_of(row, key)
    pieces = _MARKER.split(text)
    if pieces[1::2] != ["Assistant", "User"] * (len(pieces) // 4):
        pieces = [text]
    return tuple(Turn(ROLES[i % 2], text_of({key: piece}, key)) for i, piece in enumerate(pieces[::2]))


def _reference(row: JsonRow, schema: Schema, key: str) -> list[Turn]:
    """Markers in a user's text are HelpSteer2's, which the reference's conversion leaves in place."""
    masked = [name.strip().casefold() for name in value_of(row, "mask", str, "User").split(",")]  # the user's side
    if "assistant" in masked:
        raise DataError("masks the assistant, the side that is rated", "mask", 'write "mask": "User"')
    turns = []
    for turn in read_dialogue(row, schema, key, _SPEAKERS | dict.fromkeys(masked, "user")):
        plain = turn.role == "user" and not turn.ratings
        turns += prompt_turns({"value": turn.content}, "value") if plain else [turn]
    return turns


def read_dialogue(row: JsonRow, schema: Schema, key: str, speakers: Mapping[str, str] = _SPEAKERS) -> list[Turn]:
    """A list of turns, of which the first may be the system text."""
    named = key in ("conversations", "prompt_turns")
    role_key, content_key = ("from", "value") if named else ("role", "content")
    own, turns = key in ("turns", "rejected") and "turns" in row, []
    for index, entry in enumerate(value_of(row, key, list)):
        with inside(f"{key}[{index}]."):
            check_kind(dict, entry, "")
            for name, value in entry.items():
                if (name not in _OWN_KEYS) if own else (name in _UNREAD and value not in (None, 1, "", [], {})):
                    raise DataError("a key that we do not read", name, "remove it, or the row (docs/formats.md)")
            role = speakers.get(text_of(entry, role_key).casefold())
            if role is None or (own and role not in ROLES):
                cure = f"use one of: {', '.join(speakers)}; a system text may stand in the row, under 'system'"
                raise DataError(f"unknown role '{entry[role_key]}'", role_key, cure)
            content = _content(entry, content_key)
            if role != "system":
                text_of({content_key: content}, content_key)
            ratings = _ratings(entry, "label", schema) or _ratings(entry, "ratings", schema)
            predicted = _ratings(entry, "predicted_ratings", _unbounded(schema))
            turns.append(Turn(role, content, ratings, predicted, name_of(entry) if own else ""))
    return turns


def _content(entry: JsonRow, key: str) -> str:
    """A text, or a list of `{"type": "text", "text": ...}` as one text."""
    content = entry.get(key)
    if not isinstance(content, list):
        return value_of(entry, key, str)
    text = ""
    for index, part in enumerate(content):
        with inside(f"{key}[{index}]."):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise DataError("a part that is no text", cure="images and audio are not read; remove the row")
            text += value_of(part, "text", str)
    return text


def _ratings(entry: JsonRow, key: str, schema: Schema) -> dict[str, float] | None:
    """Ratings by name; a `label` is the reference's `helpfulness:4,correctness:3`."""
    given = value_of(entry, key, str if key == "label" else dict, None)
    with inside(f"{key}."):
        if isinstance(given, str):
            _check_names([pair.partition(":")[0].strip() for pair in given.split(",") if ":" in pair], schema)
            return parse_label(given, schema)
        return _checked(given or {}, schema)


@functools.cache
def _unbounded(schema: Schema) -> Schema:
    """A regression head may predict a little outside the range, so a prediction need only be a number."""
    return Schema(tuple(replace(a, low=-1e30, high=1e30) for a in schema.attributes))


def _alpaca(row: JsonRow, schema: Schema, key: str) -> list[Turn]:
    """Joined by a line break, as LLaMA-Factory does."""
    if row.get("history"):
        raise DataError("earlier turns are not read", "history", "write the row as messages (docs/formats.md)")
    question, more = text_of(row, key), value_of(row, "input", str, "")
    return [Turn("user", f"{question}\n{more}" if more else question), Turn("assistant", text_of(row, "output"))]


def _completion(row: JsonRow, schema: Schema, key: str) -> list[Turn]:
    return after_prompt(_side(row, schema, "prompt", "user"), _side(row, schema, key, "assistant"), key)


def _side(row: JsonRow, schema: Schema, key: str, role: str) -> list[Turn]:
    """TRL's: a text of this role, or messages."""
    return read_dialogue(row, schema, key) if isinstance(row.get(key), list) else [Turn(role, text_of(row, key))]


def after_prompt(prompt: Sequence[Turn], said: Sequence[Turn], field: str) -> list[Turn]:
    """A prompt and what was said after it; where that begins on the user's side it is all messages, prompt inside.

    Raises DataError: another prompt is inside.
    """
    if not prompt or not said or said[0].role == "assistant":
        return [*prompt, *said]
    system = [turn for turn in (prompt[0], said[0]) if turn.role == "system"][:1]  # it may stand in one alone
    start, whole = ([*(system if turns[0].role != "system" else ()), *turns] for turns in (prompt, said))
    texts, asked = ([(turn.role, turn.content.strip()) for turn in turns] for turns in (whole, start))
    if texts[: len(asked)] != asked:
        raise DataError("does not begin with the row's prompt", field, "leave the prompt out, or remove the row")
    return whole


FORMATS = {  # name -> (the key that tells it, (row, schema, key) -> turns)
    "helpsteer": ("prompt", _helpsteer),
    "helpsteer2": ("prompt", _helpsteer2),
    "reference": ("conversations", _reference),
    "conversation": ("turns", read_dialogue),
    "messages": ("messages", read_dialogue),
    "sharegpt": ("conversations", read_dialogue),
    "alpaca": ("instruction", _alpaca),
    "completion": ("completion", _completion),
    "steerlm2": ("prompt_turns", read_dialogue),
}


# Responses that a model gave to a prompt, with log-probabilities.


def _sampled(row: JsonRow, schema: Schema, turns: Sequence[Turn]) -> tuple[dict[str, float], tuple[Sample, ...]]:
    """The ratings that were asked for, and the responses; NeMo-Aligner's `SteerLM2Dataset`."""
    if turns[-1].role != "user":
        raise DataError("does not end with the user", "prompt_turns", "write the responses under 'responses'")
    asked = _ratings({"label": text_of(row, "label")}, "label", schema)
    samples = []
    for index, entry in enumerate(value_of(row, "responses", list)):
        with inside(f"responses[{index}]."):
            check_kind(dict, entry, "")
            if _SPEAKERS.get(text_of(entry, "from").casefold()) != "assistant":
                raise DataError(f"'{entry['from']}' is no assistant", "from", 'write "from": "Assistant"')
            logs = {field: _log_probability(entry, key) for field, key in LOG_PROBABILITIES.items()}
            samples.append(Sample(value_of(entry, "value", str), **logs))  # a model may end at once
    if not samples:
        raise DataError("no response", "responses", "add responses with their log-probabilities, or remove the row")
    return asked, tuple(samples)


def _log_probability(entry: JsonRow, key: str) -> float:
    """A number, or a text of one."""
    value = entry.get(key)
    try:
        number = float(value) if isinstance(value, str | float | int) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        what = "missing" if value is None else f"{value!r:.80} is not a finite number"
        raise DataError(what, key, "write the log-probability in nats, or remove the response")
    if number > 1e-3:  # rounding may leave a little above 0
        raise DataError(f"{number:g} is above 0, so no log-probability", key, "write log p, not -log p")
    return number


# Two responses in a row, of which people prefer one.


class Pair(NamedTuple):
    """Turns with the response that is preferred and with the other, and how much, above 0; 0 is undecided."""

    chosen: list[Turn]
    rejected: list[Turn]
    strength: float


def _trl(row: JsonRow, schema: Schema) -> Pair:
    """TRL's, UltraFeedback's and RewardBench's: texts, or messages with the prompt apart, inside, or both."""
    before = [] if row.get("prompt") is None else _side(row, schema, "prompt", "user")

    def side(key: str) -> list[Turn]:
        if before or isinstance(row.get(key), list):
            return after_prompt(before, _side(row, schema, key, "assistant"), key)
        return _hh(text_of(row, key), key)

    return Pair(side("chosen"), side("rejected"), _number(row, "margin", 1.0))


def _hh(text: str, key: str) -> list[Turn]:
    """Anthropic's `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    before, *pieces = _HH.split(text)
    if before or not pieces:
        cure = "add 'prompt', or write the text as HH does, from '\\n\\nHuman:' on"
        raise DataError("a text without a prompt", key, cure)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[name], said.strip()) for name, said in zip(pieces[::2], pieces[1::2], strict=True)]


def _helpsteer2_pair(row: JsonRow, schema: Schema) -> Pair:
    return _two(list(prompt_turns(row)), row, "response_1", "response_2", "preference_strength")


def _helpsteer3_pair(row: JsonRow, schema: Schema) -> Pair:
    text = isinstance(row.get("context"), str)
    before = [Turn("user", text_of(row, "context"))] if text else read_dialogue(row, schema, "context")
    return _two(before, row, "response1", "response2", "overall_preference")


def _two(before: list[Turn], row: JsonRow, first: str, second: str, preference: str) -> Pair:
    """A preference below 0 is for the first."""
    sides = [[*before, Turn("assistant", text_of(row, key))] for key in (first, second)]
    strength = _number(row, preference)
    return Pair(*(sides if strength < 0 else sides[::-1]), abs(strength))


def _number(row: JsonRow, key: str, *default: Any) -> float:
    value = row.get(key)
    if value is None and default:
        return default[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise DataError(f"{value!r:.80} is not a number", key, "write how much one is preferred, or remove the row")
    return float(value)


PAIRS: dict[str, tuple[tuple[str, ...], Callable[[JsonRow, Schema], Pair]]] = {  # name -> (keys that tell it, reader)
    "preference": (("chosen", "rejected"), _trl),
    "helpsteer2_preference": (("response_1", "response_2", "preference_strength"), _helpsteer2_pair),
    "helpsteer3": (("response1", "response2", "overall_preference"), _helpsteer3_pair),
}


def pair_of(row: JsonRow, schema: Schema, format: str) -> Pair | None:
    """The pair of a row of this format; of `auto`, where the row's keys tell one. None for a row that is no pair."""
    for name, (keys, read) in PAIRS.items():
        if name == format or (format == "auto" and row.keys() >= set(keys)):
            return read(row, schema)
    return None


def _check_pair(chosen: Sequence[Turn], rejected: Sequence[Turn], strength: float) -> None:
    for turns, key in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns or turns[-1].role != "assistant":
            raise DataError("no response at the end", key, "end it with an assistant turn, or remove the row")
    if not 0 <= strength < 1e30:
        raise DataError(f"a strength of {strength:g}", "strength", "0 or more; swap the responses where it is below")
    if [(t.role, t.content) for t in chosen] == [(t.role, t.content) for t in rejected]:
        raise DataError("both responses are the same text", "rejected", "remove the row; nothing can be learnt of it")


def is_pair(row: JsonRow) -> bool:
    """Whether its keys tell a layout of pairs."""
    return any(row.keys() >= set(keys) for keys, _ in PAIRS.values())


# Numbers that are no ratings: read as something else, or names and places.
_NO_RATINGS = frozenset(
    {"id", "strength", "margin", "preference_strength", "overall_preference", "mask", "line", "index", "weight"}
)


def unread_numbers(row: JsonRow, schema: Schema) -> Iterator[str]:
    """Keys of a row, and of its messages, with numbers that no attribute reads: ratings, perhaps. A list or an object
    of numbers counts as a number.

    Beside `turns`, `prompt_turns` and two responses no column is read, not even one of an attribute's name.
    """
    columns = () if "turns" in row or "prompt_turns" in row or is_pair(row) else (*schema.names, "ratings")
    yield from (key for key in _numbers(row) if key not in columns)
    for key in ("messages", "conversations", "completion"):
        for entry in row[key] if isinstance(row.get(key), list) else ():
            if isinstance(entry, dict):
                known = (*_OWN_KEYS, "label")
                yield from (f"{key}[].{name}" for name in _numbers(entry) if name not in known)


def _numbers(row: JsonRow) -> Iterator[str]:
    for key, value in row.items():
        values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if key not in _NO_RATINGS and values and all(type(one) in (int, float) for one in values):
            yield key


# The checks that all formats share.


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
        raise DataError("contains half a surrogate pair", field, "write both halves, as in \\uD83D\\uDE00") from None


def value_of(row: JsonRow, key: str, kind: type, *default: Any) -> Any:
    """The value of a key, a `kind`; null is missing, and refused unless there is a default."""
    value = row.get(key)
    if value is None and default:
        return default[0]
    if value is None:
        raise DataError("missing", key, f"add '{key}', or remove the row")
    check_kind(kind, value, key)
    return value


def text_of(row: JsonRow, key: str) -> str:
    """The text of a key, not blank."""
    text = value_of(row, key, str)
    if not text.strip():
        raise DataError("empty", key, "fill it in, or remove the row")
    return text


def name_of(row: JsonRow) -> str:
    """The `id` of a row or turn, "" where there is none; dumps number theirs."""
    name = row.get("id")
    return str(name) if type(name) is int else value_of(row, "id", str, "")


def _checked(ratings: Mapping[str, object], schema: Schema) -> dict[str, float] | None:
    """Ratings by name, each of the schema and in its range; null is a missing rating."""
    given = {name: value for name, value in ratings.items() if value is not None}
    _check_names(given, schema)
    return {name: check_rating(value, schema[name]) for name, value in given.items()} or None


def _check_names(names: Collection[str], schema: Schema) -> None:
    """Refuses names outside the schema."""
    if unknown := [name for name in names if name not in schema.names]:
        having = [title for title, preset in SCHEMAS.items() if set(names) <= set(preset.names)]
        cure = f"remove the rating, or name the attribute: {_NAMED}"
        cure += f"; the preset {' or '.join(having)} has it" if having else ""
        raise DataError("the schema has no such attribute", unknown[0], cure)


def check_turns(turns: Sequence[Turn], field: str) -> None:
    """Refuses turns that do not alternate after a system text, and ratings of the user."""
    for index, turn in enumerate(turns):
        if index and turn.role in ("system", turns[index - 1].role):
            what = f"{turn.role} after {turns[index - 1].role}: roles must alternate, a system text stands first"
            raise DataError(what, f"{field}[{index}]", "merge turns of one side, or remove the row")
        if turn.role == "user" and (turn.ratings or turn.predicted_ratings):
            raise DataError("a user turn is rated", f"{field}[{index}]", "rate the assistant's turn that answers it")
