"""Predicted ratings of assistant turns: rendered, packed so that what they share is computed once, and scored.

What is computed follows from the chunk of conversations alone: on one machine it gives the same bits again.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steerjax.bundle import Bundle
from steerjax.bundle.describe import output_names
from steerjax.chat.labels import label_line
from steerjax.chat.render import Renderer
from steerjax.command import open_model
from steerjax.data.batch import Batch
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped
from steerjax.data.packing import Layout, Row
from steerjax.data.trees import Example, Tree, grow
from steerjax.errors import DataError, ModelError
from steerjax.hf.description import Description
from steerjax.inference.label_reader import LabelReader
from steerjax.inference.packed import PackedModel
from steerjax.schema import STEERLM, Attribute, Schema

_CHUNK = 1024  # conversations that `predict` packs together
_NOTHING = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)  # is learnt


@dataclass(frozen=True)
class Chunk:
    """Conversations made ready for the model; a turn is named by (its conversation's place in the chunk, its own)."""

    examples: tuple[tuple[int, int], ...]  # E turns
    files: tuple[str, ...]  # of each "file:line: ", "" where it is of none
    trees: tuple[Tree, ...]
    rows: Mapping[int, Sequence[Row]]  # by row length
    refused: Mapping[tuple[int, int], Skipped]  # turns without a prediction


# Of a model with one output; the range is for labels and plots only.
SCORE = Attribute("score", -100.0, 100.0, "what the model's one output says")


def model_schema(description: Description) -> Schema:
    """The attributes that a reward model predicts, in the order of its outputs.

    Raises ModelError: a chat model, or outputs without the names of attributes.
    """
    description.expect("reward")
    if description.schema is not None:
        return description.schema
    labels = output_names(description)
    if len(labels) == 1 and labels[0] not in STEERLM.names:  # a score, whatever it is called
        return Schema((SCORE,))
    if unknown := [label for label in labels if label not in STEERLM.names]:
        wrong = f"its outputs are {', '.join(labels)}, and the range of {unknown[0]} is not known"
        raise ModelError(f"'{description.path}': {wrong}\n  cure: a steerjax.json with the attributes")
    return Schema(tuple(STEERLM[label] for label in labels))


def rated_schema(description: Description) -> Schema:
    """The attributes of `model_schema` that had a rating in training."""
    whole, rated = model_schema(description), description.provenance.get("rated_attributes")
    return whole if rated is None else Schema(tuple(a for a in whole.attributes if a.name in rated))


def reading_schema(schema: Schema) -> Schema:
    """For reading files: a person may have rated attributes that the model does not know."""
    return Schema(schema.attributes + tuple(a for a in STEERLM.attributes if a.name not in schema.names))


class HeadReader:
    """What `Scorer` asks of a model with a reward head."""

    room = 0  # positions that it needs behind a text

    def __init__(self, bundle: Bundle, renderer: Renderer, schema: Schema):
        self._renderer = renderer
        names = model_schema(bundle.description).names
        self._outputs = [names.index(name) for name in schema.names]

        def score(params, batch: Batch):
            return bundle.module.apply({"params": params}, *batch[:3])

        self.function = score

    def example(self, number: int, conversation: Conversation, turn: int) -> Example:
        """The text up to where its reward is read."""
        return Example("rating", number, *self._renderer.reward_tokens(conversation, turn), *_NOTHING)

    def arrays(self, rows: Mapping[int, Sequence[Row]]) -> dict:
        """What rows hold beside their tokens, for `PackedModel.run`."""
        return {}

    def read(self, layout: Layout, output: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The number of each text of a row, and its ratings [A]."""
        return ((example.number, output[place, self._outputs]) for example, place in layout.ends)


class Scorer:
    """Scores chunks of conversations; `schema` has the attributes that had a rating in training.

    The model is a reward model, or a language model that writes ratings, whose expected ratings are the scores.

    A conversation of more tokens than `row_length` (0: the model's context, at most 4096), or than the model has
    positions for, has no prediction. A step has `rows` packed rows (0: 8 for each part of the mesh that rows are cut
    into, on a CPU 1).
    Raises ModelError: no reward model; ConfigError: rows that the mesh does not divide, a bad row length.
    """

    def __init__(self, bundle: Bundle, *, row_length: int = 0, rows: int = 0):
        self.description = about = bundle.description
        self.schema = rated_schema(about)
        reader = LabelReader if about.writes_ratings else HeadReader
        self._reader = reader(bundle, bundle.renderer(self.schema), self.schema)
        self._packed = PackedModel(bundle, self._reader.function, row_length=row_length, rows=rows)
        self._longest = min(self._packed.longest, about.model.max_position_embeddings - self._reader.room)
        self.row_length, self.rows, self.counts = self._packed.row_length, self._packed.rows, self._packed.counts

    def prepare(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]], *, skip: bool = False
    ) -> Chunk:
        """Renders and packs these assistant turns of each conversation; needs no device.

        Raises DataError: a turn that cannot be rendered, unless `skip` refuses it. One that is too long is refused.
        """
        places, files, examples, refused, longest = [], [], [], {}, self._longest
        for place, turn in ((place, turn) for place, wanted in enumerate(turns) for turn in wanted):
            conversation = conversations[place]
            try:
                example = self._reader.example(len(examples), conversation, turn)
                whose = "a row has" if longest == self.row_length else "the model has positions for"
                beside = f" beside {self._reader.room} of a label line" if longest < self._packed.longest else ""
                reason = f"turns[{turn}]: {len(example.tokens)} tokens up to its end, and {whose} {longest}{beside}"
            except DataError as error:
                if not skip:
                    raise
                example, reason = None, error.reason
            if example is None or len(example.tokens) > longest:
                refused[place, turn] = Skipped(conversation.file, conversation.line, reason)
            else:
                examples.append(example)
                places.append((place, turn))
                files.append(f"{conversation.file}:{conversation.line}: " if conversation.file else "")
        trees = grow(examples)
        return Chunk(tuple(places), tuple(files), trees, self._packed.pack(trees), refused)

    def score(self, chunk: Chunk) -> np.ndarray:
        """Predicted ratings, float32 [E, A], attributes in the order of `schema`.

        Raises ModelError: one is not finite.
        """
        predicted = np.zeros((len(chunk.examples), len(self.schema)), np.float32)
        for layout, output in self._packed.run(chunk.trees, chunk.rows, self._reader.arrays(chunk.rows)):
            for number, values in self._reader.read(layout, output):
                predicted[number] = values
        if len(bad := np.argwhere(~np.isfinite(predicted))):
            (example, output), model = bad[0], self.description.path
            said = f"{chunk.files[example]}'{model}' predicts {predicted[*bad[0]]} for {self.schema.names[output]}"
            raise ModelError(f"{said}, one of {len(bad)} ratings\n  cure: check the model, or use another --dtype")
        return predicted


def open_scorer(model: str | Description, options: argparse.Namespace) -> Scorer:
    """Of a folder or its description, with `command.add_scoring_options`.

    Raises SteerjaxError: no such model, or options that do not fit it.
    """
    return Scorer(open_model(model, options), row_length=options.row_length, rows=options.rows)


def predict(
    scorer: Scorer, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]], *, skip: bool
) -> tuple[list[tuple[int, int]], np.ndarray, list[Skipped]]:
    """`Scorer.prepare` and `score` of any number.

    Returns (place in `conversations`, turn) of the turns that could be rated, their predictions [E, A], and the others.
    """
    rated, predicted, skipped = [], [np.zeros((0, len(scorer.schema)), np.float32)], []
    for begin in range(0, len(conversations), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        chunk = scorer.prepare(conversations[part], turns[part], skip=skip)
        skipped += chunk.refused.values()
        rated += [(begin + place, turn) for place, turn in chunk.examples]
        predicted.append(scorer.score(chunk))
    return rated, np.concatenate(predicted), skipped


def predicted_ratings(
    scorer: Scorer, conversations: Sequence[Conversation], turns: Sequence[int | None], *, skip: bool
) -> list[dict[str, float] | Skipped | None]:
    """Of each conversation the ratings of this turn by attribute, or why it has none; None where no turn is asked for.
    As `predict`."""
    asked = [[] if turn is None else [turn] for turn in turns]
    rated, predicted, refused = predict(scorer, conversations, asked, skip=skip)
    ratings = {place: _shortest(row, scorer.schema) for (place, _), row in zip(rated, predicted, strict=True)}
    reasons = iter(refused)
    return [
        None if turn is None else ratings[place] if place in ratings else next(reasons)
        for place, turn in enumerate(turns)
    ]


def assistant_turns(conversation: Conversation) -> list[int]:
    """Places of the assistant's turns."""
    return [place for place, turn in enumerate(conversation.turns) if turn.role == "assistant"]


def predicted_keys(predicted: np.ndarray, schema: Schema) -> dict:
    """What a turn says about a prediction [A]: ratings and label."""
    ratings = _shortest(predicted, schema)
    return {"predicted_ratings": ratings, "predicted_label": label_line(ratings, schema, "numbers")}


def _shortest(predicted: np.ndarray, schema: Schema) -> dict[str, float]:
    """The shortest decimals that are these float32 numbers [A]."""
    return {name: float(str(value)) for name, value in zip(schema.names, predicted, strict=True)}
