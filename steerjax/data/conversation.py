"""The conversation: what every reader produces and every later stage consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        role: "user" or "assistant".
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
        return [self.system, [(turn.role, turn.content, sorted((turn.ratings or {}).items())) for turn in self.turns]]

    def to_json(self) -> dict:
        """The conversation format (docs/formats.md), one object a line."""
        turns = []
        for turn in self.turns:
            known = {"ratings": turn.ratings, "predicted_ratings": turn.predicted_ratings, "id": turn.id}
            turns.append({"role": turn.role, "content": turn.content} | {k: v for k, v in known.items() if v})
        return {"system": self.system, "turns": turns, "id": self.id}
