"""What objectives have in common whose examples are rated assistant turns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steerjax.data.conversation import Conversation
from steerjax.data.trees import Example
from steerjax.errors import DataError
from steerjax.objectives.objective import TRAIN, VALIDATION, Objective


@dataclass
class Rated:
    """Rated responses of one split: ratings (None is missing), characters and conversation of each."""

    rows: list[tuple[float | None, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    messages: set[tuple[str, int] | None] = field(default_factory=set)
    shared: int = 0  # turns that are part of several conversations and count once
    unrated: int = 0  # conversations
    pairs: int = 0  # of them


class RatedTurns(Objective):
    """Every rated assistant turn is an example."""

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.data = {TRAIN: Rated(), VALIDATION: Rated()}

    def render(self, conversation: Conversation, turn: int) -> tuple[np.ndarray, Any]:
        """Tokens of a rated turn, and what else `example` takes. Raises DataError as the renderer."""
        raise NotImplementedError

    def example(self, split: str, tokens: np.ndarray, more: Any, ratings: Mapping[str, float]) -> Example:
        """Of what `render` gave; `keep` keeps its ratings."""
        raise NotImplementedError

    def keep(self, split: str, ratings: Mapping[str, float]) -> tuple[int, tuple[float | None, ...]]:
        """The number of a new example, and its row."""
        rows, row = self.data[split].rows, tuple(ratings.get(name) for name in self.setting.schema.names)
        rows.append(row)
        return len(rows) - 1, row

    def table(self, rows) -> np.ndarray:
        """Ratings as float32 [E A], NaN where they are missing."""
        return np.array(rows, np.float32).reshape(-1, len(self.setting.schema))

    def examples(self, conversation, split):
        data, examples, rated = self.data[split], [], conversation.rated()
        rendered = [self.render(*place) for place in rated]  # all, before any is kept
        for tokens, _ in rendered:
            self.setting.check_length(len(tokens))
        data.unrated += not rated
        data.pairs += not rated and bool(conversation.rejected)
        for (each, i), (tokens, more) in zip(rated, rendered, strict=True):
            turn, message = each.turns[i], each.messages()[i]
            if message and message in data.messages:
                data.shared += 1
                continue
            data.messages.add(message)
            data.lengths.append(len(turn.content))
            data.ids.append(conversation.id)
            examples.append(self.example(split, tokens, more, turn.ratings))
        return examples

    def check_data(self):
        for split, data in self.data.items():
            if not data.rows:
                what, names = f"no rated response for {split}", ", ".join(self.setting.schema.names)
                cure = (
                    f"ratings ({names}, or what config.data.attributes names) stand in columns beside prompt and "
                    "response or beside messages, or in a turn's 'ratings' (docs/formats.md)"
                )
                if data.pairs:
                    what += f", and {data.pairs} pairs without ratings"
                    cure = f"config.objectives=('bradley_terry',) learns from pairs; or {cure}"
                raise DataError(what, cure=cure)

    def rated(self, split: str) -> tuple[str, ...]:
        """The attributes that the split rates."""
        here = np.isfinite(self.table(self.data[split].rows)).any(0)
        return tuple(name for name, rated in zip(self.setting.schema.names, here, strict=True) if rated)

    def facts(self):
        return {"rated_attributes": list(self.rated(TRAIN))}

    def summary(self):
        said = {}
        for split, data in self.data.items():
            here = self.rated(split)
            missing = ", ".join(name for name in self.setting.schema.names if name not in here)
            words = (
                f"{len(data.rows)} rated responses",
                missing and f"none rated for {missing}",
                data.unrated and f"{data.unrated} conversations without a rating",
                data.shared and f"{data.shared} turns that stand in several conversations count once",
            )
            said[f"{self.name}, {split}"] = "; ".join(filter(None, words))
        return said
