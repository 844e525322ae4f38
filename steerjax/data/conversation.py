"""The conversation: what every reader produces and every later stage consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from steerjax.errors import DataError
from steerjax.schema import Schema, check_rating

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        role: "user" or "assistant".
        content: the text.
        ratings: human ratings by attribute name; a missing name is a missing rating.
        predicted_ratings: a model's ratings. Never mixed with human ones.
    """

    role: str
    content: str
    ratings: Mapping[str, float] | None = None
    predicted_ratings: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with where they came from.

    Attributes:
        turns: at least one.
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
        """The conversation format of the documentation (docs/formats.md), one object a line."""
        turns = []
        for turn in self.turns:
            entry: dict = {"role": turn.role, "content": turn.content}
            if turn.ratings is not None:
                entry["ratings"] = dict(turn.ratings)
            if turn.predicted_ratings is not None:
                entry["predicted_ratings"] = dict(turn.predicted_ratings)
            turns.append(entry)
        return {"system": self.system, "turns": turns, "id": self.id}


def checked_ratings(ratings: object, schema: Schema, field: str) -> dict[str, float] | None:
    """Ratings of one turn, checked against the schema; null ratings are missing ones.

    Raises:
        DataError: not a mapping, an unknown name, or a rating that `check_rating` refuses.
    """
    if ratings is None:
        return None
    if not isinstance(ratings, Mapping):
        raise DataError(f"expected a mapping of name to number, got {type(ratings).__name__}", field=field)
    return {name: check_rating(value, schema[name]) for name, value in ratings.items() if value is not None}
