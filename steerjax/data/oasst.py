"""OpenAssistant's message trees -> one conversation a thread.

Rules: NeMo-Aligner `examples/nlp/data/steerlm/preprocess_openassistant_data.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from steerjax.data.conversation import Conversation, Turn
from steerjax.data.formats import JsonRow, check_kind, check_turns, inside, text_of, value_of
from steerjax.data.readers import iter_rows
from steerjax.errors import ConfigError, DataError
from steerjax.schema import OASST, Attribute, Schema, check_rating

_ROLES = {"prompter": "user", "assistant": "assistant"}


def read_threads(
    source: str, schema: Schema, *, lang: str | None = None, keep_deleted: bool = False,
    dropped: Counter[str] | None = None,
) -> Iterator[tuple[int, Conversation | DataError]]:  # fmt: skip
    """(line, conversation) for every thread, a path from a tree's root to a leaf; a bad tree is one DataError.

    `source` holds trees (`{"prompt": {..., "replies": [...]}}` or the root message itself), or messages one by one
    (`message_id`, `parent_id`), as the hub has them. Labels are scaled to the schema's range and rounded half to even;
    `helpfulness` is left out, as it is another scale than HelpSteer's. Threads of one message, deleted messages and
    other languages than `lang` are dropped, with the replies to them, and counted in `dropped` by reason.

    Raises DataError: the source cannot be read, or no thread is left. ConfigError: the schema has none of the four.
    """
    if not set(schema.names) & set(OASST.names):
        raise ConfigError(f"the schema has none of {', '.join(OASST.names)}; cure: use the schema oasst or steerlm")
    counts, empty = Counter(), True

    def kept(message: JsonRow) -> bool:
        deleted = not keep_deleted and message.get("deleted")
        if not deleted and (not lang or message.get("lang") == lang):
            return True
        counts["deleted messages" if deleted else f"messages not in '{lang}'"] += 1
        counts["replies to such messages"] += len(_all(message)) - 1
        return False

    for line, tree in _trees(source):
        try:
            if isinstance(tree, DataError):
                raise tree
            threads = _threads(tree, schema, kept, counts)
            found = [(line, Conversation(turns, None, turns[-1].id, source, line)) for turns in threads]
        except DataError as error:
            found = [(line, error.at(source, line))]
        empty = empty and not found
        yield from found
    if dropped is not None:
        dropped.update(+counts)
    if empty and counts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in (+counts).items())
        raise DataError(f"no thread is left: {reasons}", file=source, cure="look at --lang and --keep-deleted")


def _trees(source: str) -> Iterator[tuple[int, JsonRow | DataError]]:
    """(line, root message) of each tree, replies nested under `replies`; messages one by one come last."""
    flat: dict[str, tuple[int, JsonRow]] = {}
    for line, row in iter_rows(source):
        if isinstance(row, DataError) or "replies" in row:
            yield line, row
        elif isinstance(row.get("prompt"), dict):
            yield line, row["prompt"]
        elif not isinstance(name := row.get("message_id"), str) or not isinstance(row.get("parent_id"), str | None):
            cure = "write trees with 'prompt' and 'replies', or messages with 'message_id' and 'parent_id'"
            yield line, DataError(f"no message tree with keys {list(row)}", cure=cure)
        elif name in flat:
            yield line, DataError("stands twice", "message_id", "keep one")
        else:
            flat[name] = line, {**row, "replies": []}
    roots = [(line, row) for line, row in flat.values() if not row.get("parent_id")]
    for _, row in flat.values():
        if row.get("parent_id") in flat:
            flat[row["parent_id"]][1]["replies"].append(row)
    yield from roots
    reached = {message["message_id"] for _, root in roots for message in _all(root)}
    cure = "add the messages that it answers, or remove it"
    for name, (line, _) in flat.items():
        if name not in reached:
            yield line, DataError("the message leads to no root", "parent_id", cure)


def _all(root: JsonRow) -> list[JsonRow]:
    """The message, and all replies below it."""
    messages = [root]
    for message in messages:
        messages += _replies(message)
    return messages


def _replies(message: JsonRow) -> list[JsonRow]:
    with inside(f"message {message.get('message_id')}."):
        replies = value_of(message, "replies", list, [])
        for reply in replies:
            check_kind(dict, reply, "replies")
    return replies


def _threads(root: JsonRow, schema: Schema, kept: Callable[[JsonRow], bool], counts: Counter[str]) -> Iterator[tuple]:
    """The paths from the root to each leaf, depth first, replies in their order."""
    below: list[tuple[JsonRow, tuple[Turn, ...]]] = [(root, ())] if kept(root) else []
    while below:
        message, turns = below.pop()
        replies = [reply for reply in _replies(message) if kept(reply)]
        if not replies and not turns:
            counts["threads of one message"] += 1
            continue
        turns = (*turns, _turn(message, schema))
        check_turns(turns, f"message {turns[-1].id}, turns")
        if not replies:
            yield turns
        below += [(reply, turns) for reply in reversed(replies)]


def _turn(message: JsonRow, schema: Schema) -> Turn:
    name = text_of(message, "message_id")
    with inside(f"message {name}."):
        if (speaker := text_of(message, "role")) not in _ROLES:
            raise DataError(f"unknown role '{speaker}'", "role", f"use {' or '.join(_ROLES)}")
        rated = schema.attributes if speaker == "assistant" else ()
        ratings = _ratings(value_of(message, "labels", dict, {}), rated)
        return Turn(_ROLES[speaker], text_of(message, "text"), ratings or None, id=name)


def _ratings(labels: JsonRow, attributes: tuple[Attribute, ...]) -> dict[str, float]:
    """Of `{"quality": {"value": 0.75, ...}}`, or of the hub's `{"name": [...], "value": [...]}`; 0 to 1."""
    ratings = {}
    with inside("labels."):
        if isinstance(names := labels.get("name"), list):
            values = value_of(labels, "value", list)
            if len(names) != len(values):
                raise DataError(f"{len(values)} values of {len(names)} names", "value", "write one value a name")
            labels = {str(name): {"value": value} for name, value in zip(names, values, strict=True)}
        for attribute in attributes:
            label = value_of(labels, attribute.name, dict, None) if attribute.name in OASST.names else None
            if label is not None:
                value = check_rating(label.get("value"), Attribute(attribute.name, 0, 1))
                ratings[attribute.name] = float(round(attribute.low + value * (attribute.high - attribute.low)))
    return ratings
