"""The conversation: what every reader produces and every later stage consumes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from steerjax.data.checks import inside
from steerjax.errors import DataError
from steerjax.schema import SCHEMAS, Schema, check_rating

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        role: "user" or "assistant".
        content: the text.
        ratings: human ratings by attribute name; a missing name is a missing rating.
        predicted_ratings: a model's ratings. Never mixed with human ones.
        id: the message's own name, where the data has one: threads of one tree that share it share this turn.
    """

    role: str
    content: str
    ratings: Mapping[str, float] | None = None
    predicted_ratings: Mapping[str, float] | None = None
    id: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with where they came from.

    Attributes:
        turns: at least one; roles alternate, from either side.
        system: the system text; None means the template's default, "" an empty one.
        id: the row's own name, or "FILE:LINE".
        file, line: the place in the source, for error messages; line counts from 1.
    """

    turns: tuple[Turn, ...]
    system: str | None = None
    id: str = ""
    file: str = ""
    line: int = 0

    def content(self) -> list:
        """What a duplicate has in common with it: system, roles, contents and human ratings."""
        turns = [(turn.role, turn.content, sorted((turn.ratings or {}).items())) for turn in self.turns]
        return [self.system, turns]

    def to_json(self) -> dict:
        """The conversation format (docs/formats.md), one object a line."""
        turns = []
        for turn in self.turns:
            entry: dict = {"role": turn.role, "content": turn.content}
            if turn.ratings is not None:
                entry["ratings"] = dict(turn.ratings)
            if turn.predicted_ratings is not None:
                entry["predicted_ratings"] = dict(turn.predicted_ratings)
            turns.append(entry | ({"id": turn.id} if turn.id else {}))
        return {"system": self.system, "turns": turns, "id": self.id}


def checked_ratings(ratings: object, schema: Schema, field: str) -> dict[str, float] | None:
    """Ratings by name, each of the schema and in its range; null ratings are missing ones.

    Args:
        field: where they stand in the row, for messages; "" is the row itself.

    Raises:
        DataError: not a mapping, a name outside the schema, or a rating that `check_rating` refuses.
    """
    if ratings is None:
        return None
    if not isinstance(ratings, Mapping):
        message = f"expected an object of name to number, got {type(ratings).__name__}"
        raise DataError(message, field=field, cure='write e.g. {"helpfulness": 4}')
    given = {name: value for name, value in ratings.items() if value is not None}
    with inside(f"{field}." if field else ""):
        check_names(given, schema)
        return {name: check_rating(value, schema[name]) for name, value in given.items()}


def check_names(names: Collection[str], schema: Schema) -> None:
    """Refuses names outside the schema; the cure names the preset that has them.

    Raises:
        DataError: names the first.
    """
    if unknown := [name for name in names if name not in schema.names]:
        having = [title for title, preset in SCHEMAS.items() if set(names) <= set(preset.names)]
        cure = f"take the schema {' or '.join(having)} (data.schema)" if having else "add it to data.attributes"
        raise DataError("the schema has no such attribute", field=unknown[0], cure=f"{cure}; or remove the rating")


def checked_turns(turns: tuple[Turn, ...], field: str) -> tuple[Turn, ...]:
    """The turns, if roles alternate and only the assistant is rated; `field` may hold the index."""
    for index, turn in enumerate(turns):
        if index and turn.role == turns[index - 1].role:
            message = f"roles must alternate: expected {ROLES[turn.role == ROLES[0]]}, got {turn.role}"
            raise DataError(message, field=field.format(index), cure="merge turns of one side, or remove the row")
        if turn.role == "user" and (turn.ratings or turn.predicted_ratings):
            cure = "rate the assistant's turn that answers it"
            raise DataError("a user turn is rated", field=field.format(index), cure=cure)
    return turns
