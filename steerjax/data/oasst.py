"""OpenAssistant's message trees -> one conversation a thread.

Rules: NeMo-Aligner `examples/nlp/data/steerlm/preprocess_openassistant_data.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from steerjax.data.checks import Row, inside, text_of
from steerjax.data.conversation import Conversation, Turn, checked_turns
from steerjax.data.readers import iter_rows
from steerjax.errors import ConfigError, DataError
from steerjax.schema import OASST, Attribute, Schema, check_rating

_ROLES = {"prompter": "user", "assistant": "assistant"}
_LABEL_RANGE = (0.0, 1.0)  # a label in OASST is a mean over raters


def read_threads(
    source: str,
    schema: Schema,
    *,
    lang: str | None = None,
    keep_deleted: bool = False,
    dropped: Counter[str] | None = None,
) -> Iterator[tuple[int, Conversation | DataError]]:
    """(line, conversation) for every thread, a path from a tree's root to a leaf; a bad tree is one DataError.

    A turn has its ratings and its message's id in each of its threads. Labels are scaled to the schema's range and
    rounded half to even. Only quality, toxicity, humor and creativity are taken: OASST's `helpfulness` is another scale
    than HelpSteer's. Threads of one message are dropped.

    Args:
        source: trees (`{"prompt": {..., "replies": [...]}}` or the root message itself), or messages one by one
            (`message_id`, `parent_id`), as the hub has them.
        lang: keep only messages in this language, e.g. "en"; the replies to others go with them.
        keep_deleted: keep deleted messages; else they and their replies are left out.
        dropped: counts the messages and threads that are left out, by reason.

    Raises:
        DataError: the source cannot be read at all, or no thread is left. ConfigError: the schema has none of the four.
    """
    if not set(schema.names) & set(OASST.names):
        raise ConfigError(f"the schema has none of {', '.join(OASST.names)}; cure: use the schema oasst or steerlm")
    dropped, found = Counter() if dropped is None else dropped, False
    before = dropped.copy()

    def kept(message: Row) -> bool:
        deleted = not keep_deleted and message.get("deleted")
        if not deleted and (not lang or message.get("lang") == lang):
            return True
        dropped["deleted messages" if deleted else f"messages not in '{lang}'"] += 1
        dropped["replies to such messages"] += sum(1 for _ in _all(message)) - 1
        return False

    for line, tree in _trees(source):
        try:
            if isinstance(tree, DataError):
                raise tree
            threads = [replace(t, file=source, line=line) for t in _threads(tree, schema, kept, dropped)]
        except DataError as error:
            threads = [error.at(source, line)]
        found = found or bool(threads)
        yield from ((line, thread) for thread in threads)
    if not found and dropped > before:
        reasons = ", ".join(f"{count} {reason}" for reason, count in (dropped - before).items())
        raise DataError(f"no thread is left: {reasons}", file=source, cure="look at --lang and --keep-deleted")


def _trees(source: str) -> Iterator[tuple[int, Row | DataError]]:
    """(line, root message) of each tree, replies nested under `replies`."""
    flat: list[tuple[int, Row]] = []
    for line, row in iter_rows(source):
        if isinstance(row, DataError):
            yield line, row
        elif isinstance(row.get("prompt"), Mapping):
            yield line, row["prompt"]
        elif "replies" in row:
            yield line, row
        elif isinstance(row.get("message_id"), str) and isinstance(row.get("parent_id"), str | None):
            flat.append((line, row))
        else:
            cure = "write trees with 'prompt' and 'replies', or messages with 'message_id' and 'parent_id'"
            yield line, DataError(f"no message tree with keys {list(row)}", cure=cure)
    yield from _nested(flat)


def _nested(messages: list[tuple[int, Row]]) -> Iterator[tuple[int, Row | DataError]]:
    """Trees of messages that name their parent, in the order of their roots."""
    by_id: dict[str, tuple[int, Row]] = {}
    for line, row in messages:
        if row["message_id"] in by_id:
            yield line, DataError("stands twice", field="message_id", cure="keep one")
        else:
            by_id[row["message_id"]] = (line, {**row, "replies": []})
    for _, row in by_id.values():
        if row.get("parent_id") in by_id:
            by_id[row["parent_id"]][1]["replies"].append(row)
    roots = [(line, row) for line, row in by_id.values() if not row.get("parent_id")]
    yield from roots
    reached = {message["message_id"] for _, root in roots for message in _all(root)}
    for name, (line, _) in by_id.items():
        if name not in reached:
            cure = "add the messages that it answers, or remove it"
            yield line, DataError("the message leads to no root", field="parent_id", cure=cure)


def _all(root: Row) -> Iterator[Row]:
    """The message, and all replies below it."""
    below = [root]
    while below:
        message = below.pop()
        yield message
        below += _replies(message)


def _replies(message: Row) -> list[Row]:
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        field = f"message {message.get('message_id')}.replies"
        raise DataError("expected a list of messages", field=field, cure="check the export")
    return replies


def _threads(root: Row, schema: Schema, kept: Callable[[Row], bool], dropped: Counter[str]) -> Iterator[Conversation]:
    """The paths from the root to each leaf, depth first, replies in their order."""
    below: list[tuple[Row, tuple[Turn, ...]]] = [(root, ())] if kept(root) else []
    while below:
        message, before = below.pop()
        replies = [reply for reply in _replies(message) if kept(reply)]
        if not replies and not before:
            dropped["threads of one message"] += 1
            continue
        turns = (*before, _turn(message, schema))
        checked_turns(turns[-2:], f"message {turns[-1].id}.role")
        if not replies:
            yield Conversation(turns, id=turns[-1].id)
        below += [(reply, turns) for reply in reversed(replies)]


def _turn(message: Row, schema: Schema) -> Turn:
    name = text_of(message, "message_id")
    with inside(f"message {name}."):
        speaker = text_of(message, "role")
        if speaker not in _ROLES:
            raise DataError(f"unknown role '{speaker}'", field="role", cure=f"use {' or '.join(_ROLES)}")
        content, ratings = text_of(message, "text"), None
        if _ROLES[speaker] == "assistant":
            with inside("labels."):
                ratings = _ratings(message.get("labels"), schema) or None
        return Turn(_ROLES[speaker], content, ratings, id=name)


def _ratings(labels: object, schema: Schema) -> dict[str, float]:
    """`{"quality": {"value": 0.75, ...}}`, or the hub's `{"name": [...], "value": [...]}`, scaled and rounded."""
    cure = 'write {"quality": {"value": 0.75}}'
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise DataError(f"expected an object, got {type(labels).__name__}", cure=cure)
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list) and len(names) == len(values):
        labels = {name: {"value": value} for name, value in zip(names, values, strict=True)}
    ratings = {}
    for attribute in schema.attributes:
        label = labels.get(attribute.name) if attribute.name in OASST.names else None
        if label is None:
            continue
        if not isinstance(label, Mapping):
            raise DataError("expected an object with 'value'", field=attribute.name, cure=cure)
        value = check_rating(label.get("value"), Attribute(attribute.name, *_LABEL_RANGE))
        ratings[attribute.name] = float(round(attribute.low + value * (attribute.high - attribute.low)))
    return ratings
