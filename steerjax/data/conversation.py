"""The conversation: what every reader produces and every later stage consumes."""

from collections.abc import Mapping
from dataclasses import dataclass

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: str  # "user" or "assistant"
    content: str
    ratings: Mapping[str, float] | None = None  # of people, by attribute name; a missing name is a missing rating
    predicted_ratings: Mapping[str, float] | None = None  # a model's; never mixed with human ones
    id: str = ""  # the message's own name, where the data has one: threads of one tree that share it share this turn


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with where they came from."""

    turns: tuple[Turn, ...]  # at least one; roles alternate, from either side
    system: str | None = None  # None means the template's default, "" an empty one
    id: str = ""  # the row's own name, or "FILE:LINE"
    file: str = ""
    line: int = 0  # from 1

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
