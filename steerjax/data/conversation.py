"""The conversation: what every reader produces and every later stage consumes."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

ROLES = ("user", "assistant")
LOG_PROBABILITIES = {  # a sample's field -> its key in NeMo-Aligner's rows
    "log_rating": "log(P(a|x,y))", "log_prior": "log(P(y|x))", "log_sampled": "log(Q(y|a,x))",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: str  # "user" or "assistant"
    content: str
    ratings: Mapping[str, float] | None = None  # of people, by attribute name; a missing name is a missing rating
    predicted_ratings: Mapping[str, float] | None = None  # a model's; never mixed with human ones
    id: str = ""  # the message's own name, where the data has one


@dataclass(frozen=True)
class Sample:
    """A response y that a model Q' gave to a prompt x and asked ratings a, with log-probabilities in nats."""

    content: str
    log_rating: float  # log P(a|x,y), by a reward model
    log_prior: float  # log P(y|x), by a chat model without a label line
    log_sampled: float  # log Q'(y|a,x)


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with where they came from."""

    turns: tuple[Turn, ...]  # at least one; roles alternate, from either side
    system: str | None = None  # None means the template's default, "" an empty one
    id: str = ""  # the row's own name, or "FILE:LINE"
    file: str = ""
    line: int = 0  # from 1
    rejected: tuple[Turn, ...] = ()  # the same with another response, to which people prefer the one in `turns`
    strength: float = 1.0  # how much; 0 is undecided
    asked: Mapping[str, float] = field(default_factory=dict)  # ratings that the samples were asked for
    samples: tuple[Sample, ...] = ()  # responses to `turns`, which then end with a user's

    def both(self) -> tuple["Conversation", "Conversation"]:
        """The two conversations of a pair, each alone."""
        return tuple(replace(self, turns=turns, rejected=()) for turns in (self.turns, self.rejected))

    def messages(self) -> list[tuple[str, int] | None]:
        """Of each turn with an id what is equal where threads of one tree share it: id, and a hash of all that was said
        up to it, as people number the turns of a row, too."""
        said = accumulate((hash(turn.content) for turn in self.turns), lambda *both: hash(both))
        return [(turn.id, number) if turn.id else None for turn, number in zip(self.turns, said, strict=True)]

    def rated(self) -> list[tuple["Conversation", int]]:
        """The turns with ratings, each with the conversation it stands in: of a pair those of both sides, what they
        share once."""
        found = [(self, i) for i, turn in enumerate(self.turns) if turn.ratings]
        if self.rejected:
            other, seen = self.both()[1], dict(enumerate(self.turns))
            found += [(other, i) for i, turn in enumerate(other.turns) if turn.ratings and turn != seen.get(i)]
        return found

    def content(self) -> list:
        """What a duplicate has in common with it: system, roles, contents and human ratings; asked ratings, samples."""
        turns = self.turns + self.rejected
        said = [(turn.role, turn.content, sorted((turn.ratings or {}).items())) for turn in turns]
        said = [self.system, said, *([len(self.turns), self.strength] if self.rejected else [])]
        return said + ([sorted(self.asked.items()), [s.content for s in self.samples]] if self.samples else [])

    def to_json(self) -> dict:
        """The conversation format, or of samples `steerlm2` (docs/formats.md), one object a line."""
        if self.samples:
            return self._sampled_json()
        pair = {"rejected": _said(self.rejected), "strength": self.strength} if self.rejected else {}
        return {"system": self.system, "turns": _said(self.turns), **pair, "id": self.id}

    def _sampled_json(self) -> dict:
        return {
            "system": self.system,
            "prompt_turns": [{"from": turn.role.capitalize(), "value": turn.content} for turn in self.turns],
            "label": ",".join(f"{name}:{int(r) if r == int(r) else r}" for name, r in self.asked.items()),
            "responses": [
                {"from": "Assistant", "value": sample.content}
                | {key: getattr(sample, field) for field, key in LOG_PROBABILITIES.items()}
                for sample in self.samples
            ],
            "id": self.id,
        }


def context_key(system: str | None, turns: Sequence[Turn]) -> str:
    """Names a system text and the turns before an answer: answers with one key are responses to the same."""
    said = [system, *((turn.role, turn.content) for turn in turns)]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()


def _said(turns: Iterable[Turn]) -> list[dict]:
    said = []
    for turn in turns:
        known = {"ratings": turn.ratings, "predicted_ratings": turn.predicted_ratings, "id": turn.id}
        said.append({"role": turn.role, "content": turn.content} | {k: v for k, v in known.items() if v})
    return said
