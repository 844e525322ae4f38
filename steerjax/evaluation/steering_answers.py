"""Answers to requested ratings: read from what `generate` wrote, or generated here over a grid of requests."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerjax.data.conversation import Conversation, Turn, context_key
from steerjax.data.readers import iter_rows, source_format, typed_rows
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.files import write_text
from steerjax.hf.description import Description
from steerjax.inference.steering import Setting, label_of, swept
from steerjax.schema import Attribute, Schema, round_rating
from steerjax.typed import row_type, typed

PROMPTS, ANSWERS = "prompts.jsonl", "answers.jsonl"


@dataclass(frozen=True)
class SteeredAnswer:
    """The last turn of a conversation, the ratings that were asked for and a reward model's, by attribute; `cut`, at
    the limit of tokens."""

    conversation: Conversation
    requested: Mapping[str, float]
    predicted: Mapping[str, float]
    cut: bool = False

    @property
    def prompt(self) -> str:
        """Names the system text and the turns before the answer."""
        return context_key(self.conversation.system, self.conversation.turns[:-1])

    @property
    def text(self) -> str:
        return self.conversation.turns[-1].content


@row_type
class _Generation:
    attributes: dict[str, float]
    finish: str | None = None


@row_type
class _Row:
    turns: tuple[Turn, ...]
    generation: _Generation
    system: str | None = None
    id: Any = ""


def read_answers(source: str) -> Iterator[SteeredAnswer]:
    """What `generate` wrote. Raises DataError: a row that is no answer; names file and line."""
    cure = "give a file that generate wrote, or annotate after it"
    for line, read in typed_rows(source, _Row, cure):
        if not read.turns or read.turns[-1].role != "assistant":
            raise DataError("the last turn is no answer", "turns", cure, file=source, line=line)
        turns = tuple(Turn(turn.role, turn.content) for turn in read.turns)
        conversation = Conversation(turns, read.system, str(read.id or f"{source}:{line}"), file=source, line=line)
        predicted = read.turns[-1].predicted_ratings or {}
        yield SteeredAnswer(conversation, read.generation.attributes, predicted, read.generation.finish == "length")


def requested_schema(answers: Sequence[SteeredAnswer], known: Schema) -> Schema:
    """The attributes that were asked for: those of `known`, then others, whose ranges span the requests.

    Raises DataError: a request outside a known range; names file and line.
    """
    asked: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.requested.items():
            asked.setdefault(name, []).append(value)
            if name in known.names and not (a := known[name]).low <= value <= a.high:
                wrong = f"{value:g} was asked for, outside {a.low:g}..{a.high:g}"
                cure = "name the model that answered with --model, or its preset with --schema"
                raise DataError(wrong, name, cure, file=answer.conversation.file, line=answer.conversation.line)
    told = (
        {"name": name, "low": min(values), "high": max(*values, min(values) + 1)}
        for name, values in asked.items() if name not in known.names
    )  # fmt: skip
    others = typed(tuple[Attribute, ...], tuple(told), "generation.attributes", DataError)
    return Schema(tuple(a for a in known.attributes if a.name in asked) + others)


def neutral_request(answers: Sequence[SteeredAnswer], schema: Schema) -> dict[str, float]:
    """Of each attribute the rating that most answers were asked for, of equally many the middle one; attributes that
    most were not asked for are not there."""
    found = {}
    for name in schema.names:
        counts = Counter(answer.requested.get(name) for answer in answers)
        most = [value for value, count in counts.items() if count == max(counts.values())]
        most.sort(key=lambda value: (value is not None, value or 0))
        found[name] = most[(len(most) - 1) // 2]
    return {name: value for name, value in found.items() if value is not None}


def grid_of(texts: Sequence[str], base: Setting, schema: Schema, defaults: Mapping[str, float] | None) -> list[Setting]:
    """The neutral setting `base`, then those of each text; those that come to the same label line once.

    A text is `NAME=N,N,...`, `NAME=LOW..HIGH` or `NAME`, the other ratings as in `base`; several with spaces between
    are every combination. Without a text each attribute at its lowest, middle and highest rating.
    """
    if not texts:
        ends = {a.name: (a.labels[0], a.labels[(len(a.labels) - 1) // 2], a.labels[-1]) for a in schema.attributes}
        texts = [f"{name}={','.join(str(rating) for rating in dict.fromkeys(few))}" for name, few in ends.items()]
    settings = [base, *({**base, **setting} for text in texts for setting in swept("", text.split(), schema))]

    first: dict[tuple, Setting] = {}
    for setting in settings:
        label = {name: round_rating(rating, schema[name]) for name, rating in label_of(setting, defaults).items()}
        first.setdefault(tuple(sorted(label.items())), setting)
    return list(first.values())


def generate_answers(o: argparse.Namespace, about: Description | None) -> tuple[str, list[str]]:
    """Answers --prompts over the grid into the output folder, going on where an earlier run was.

    Returns the file and sentences about its making. Raises SteerjaxError: options that do not fit.
    """
    from steerjax.data.loading import file_hashes
    from steerjax.inference.session import Session

    if about is not None and about.kind != "chat":
        raise ModelError(f"'{o.model}' is a {about.kind} model\n  cure: a chat model; --reward-model rates its answers")
    if about is not None and about.schema is None and not o.schema and not o.server:
        raise ModelError(f"'{o.model}' does not say which attributes it takes\n  cure: --schema")
    if about is None and not (o.schema or o.grid):
        raise ConfigError("which attributes the server's model takes is not known; cure: --grid, --schema or --model")
    folder = Path(o.output)
    prompts, answers = folder / PROMPTS, folder / ANSWERS
    fixed = {"prompt": None, "input": str(prompts), "output": str(answers), "sweep": [], "combinations": None,
             "replace_answer": False, "samples": 1, "top_k": None, "top_p": 1.0, "format": "auto"}  # fmt: skip
    session = Session(argparse.Namespace(**(vars(o) | fixed)), about)
    session.settings = grid_of(o.grid, session.settings[0], session.schema, session.defaults)
    if len(session.settings) < 2:
        raise ConfigError(f"--grid {' '.join(o.grid)}: asks for nothing but the neutral request; cure: other ratings")
    chosen = _prompts(o, session.schema)
    write_text(prompts, "".join(json.dumps(c.to_json()) + "\n" for c in chosen))
    made = f"{len(chosen)} prompts of {o.prompts} x {len(session.settings)} requests"
    print(f"{made}: {len(chosen) * len(session.settings)} answers")
    session.answer_file()
    said, trained_on = [made], (about.provenance.get("data") or {}) if about else {}
    if set(file_hashes([o.prompts]).values()) & set(trained_on.values()):
        said.append(f"{o.prompts} is in the chat model's training data: these prompts are not held out")
    return str(answers), said


def _prompts(o: argparse.Namespace, schema: Schema) -> list[Conversation]:
    """The first --limit different prompts. Raises DataError: none, or a row that is no prompt, unless it is skipped."""
    from steerjax.inference.session import prompt_of

    chosen: dict[str, Conversation] = {}
    for line, row in iter_rows(o.prompts):
        if len(chosen) == o.limit:
            break
        try:
            if isinstance(row, DataError):
                raise row
            read = prompt_of(row, schema, True, source_format(o.prompts, o.format))
        except DataError as error:
            if o.on_bad_row == "error":
                raise error.at(o.prompts, line) from None
            continue
        key, name = context_key(read.system, read.turns), read.id or f"{o.prompts}:{line}"
        chosen.setdefault(key, Conversation(read.turns, read.system, name, o.prompts, line))
    if not chosen:
        raise DataError("no prompt", file=o.prompts, cure="rows that end with a user's turn, or {'prompt': ...}")
    return list(chosen.values())
