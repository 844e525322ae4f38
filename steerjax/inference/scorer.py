"""Predicted ratings of assistant turns: rendered, packed so that what they share is computed once, and scored.

What is computed follows from the chunk of conversations alone: on one machine it gives the same bits again.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from steerjax.bundle import Bundle
from steerjax.bundle.describe import output_names
from steerjax.command import open_model
from steerjax.data.batch import Batch, Feeder, RowBuilder, evaluation_steps
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped
from steerjax.data.packing import Row, fill, parts_of
from steerjax.data.trees import Example, Tree, grow
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.hf.description import Description
from steerjax.parallel.rules import mesh_ways, partition_spec
from steerjax.schema import STEERLM, Attribute, Schema, format_label

_SHORTEST_ROW = 1024  # tokens; shorter conversations share a row of this length
_LONGEST_ROW = 4096  # tokens, unless the user says otherwise
_CHUNK = 1024  # conversations that `predict` packs together
_NOTHING = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)  # is learnt


@dataclass(frozen=True)
class Chunk:
    """Conversations made ready for the model; a turn is named by (its conversation's place in the chunk, its own)."""

    examples: tuple[tuple[int, int], ...]  # E turns
    trees: tuple[Tree, ...]
    rows: Mapping[int, Sequence[Row]]  # by row length
    refused: Mapping[tuple[int, int], Skipped]  # turns without a prediction


@dataclass
class Counts:
    """What was computed so far: turns with a prediction, tokens, their places (padding too), compiled shapes."""

    turns: int = 0
    tokens: int = 0
    places: int = 0
    shapes: set[tuple[int, int]] = field(default_factory=set)  # (rows, row length)

    def __str__(self) -> str:
        filled = self.tokens / max(1, self.places)
        shapes = ", ".join(f"{rows} x {length}" for rows, length in sorted(self.shapes)) or "nothing"
        return f"{self.turns} turns, {self.tokens:,} tokens, rows {filled:.1%} filled, compiled for {shapes}"


# Of a model with one output; the range is for labels and plots only.
SCORE = Attribute("score", -100.0, 100.0, "what the model's one output says")


def model_schema(description: Description) -> Schema:
    """The attributes that a reward model predicts, in the order of its outputs.

    Raises ModelError: a chat model, or outputs without the names of attributes.
    """
    if description.kind != "reward":
        raise ModelError(f"'{description.path}' is a {description.kind} model\n  cure: give a reward model")
    if description.schema is not None:
        return description.schema
    labels = output_names(description)
    if len(labels) == 1 and labels[0] not in STEERLM.names:  # a score, whatever it is called
        return Schema((SCORE,))
    if unknown := [label for label in labels if label not in STEERLM.names]:
        wrong = f"its outputs are {', '.join(labels)}, and the range of {unknown[0]} is not known"
        raise ModelError(f"'{description.path}': {wrong}\n  cure: a steerjax.json with the attributes")
    return Schema(tuple(STEERLM[label] for label in labels))


def reading_schema(schema: Schema) -> Schema:
    """For reading files: a person may have rated attributes that the model does not know."""
    return Schema(schema.attributes + tuple(a for a in STEERLM.attributes if a.name not in schema.names))


def row_lengths(longest: int) -> tuple[int, ...]:
    """Lengths of packed rows, ascending: powers of two from 1024 tokens, and the longest."""
    doubled = (_SHORTEST_ROW << n for n in range(longest.bit_length()))
    return (*(length for length in doubled if length < longest), longest)


def bucketed_rows(trees: Sequence[Tree], lengths: Sequence[int]) -> dict[int, list[Row]]:
    """Each part of the trees in a row of the shortest of these ascending lengths, or in what a longer has left."""
    parts = [part for number, tree in enumerate(trees) for part in parts_of(number, tree, lengths[-1], None)]
    rows: dict[int, list[Row]] = {}
    for shorter, length in reversed(list(zip((0, *lengths), lengths, strict=False))):
        packed = fill(parts, length)
        needed = [row for row in packed if row[0].length > shorter]  # the longest part stands first
        parts = [part for row in packed if row[0].length <= shorter for part in row]
        if needed:
            rows[length] = needed
    return rows


class Scorer:
    """Scores chunks of conversations with a reward model; `schema` has the attributes that had a rating in training.

    A conversation of more tokens than `row_length` (0: the model's context, at most 4096), or than the model has
    positions for, has no prediction. A step has `rows` packed rows (0: 8 for each part of the mesh that rows are cut
    into, on a CPU 1).
    Raises ModelError: no reward model; ConfigError: rows that the mesh does not divide, a bad row length.
    """

    def __init__(self, bundle: Bundle, *, row_length: int = 0, rows: int = 0):
        self.description = about = bundle.description
        whole, rated = model_schema(about), about.provenance.get("rated_attributes")
        self.schema = whole if rated is None else Schema(tuple(a for a in whole.attributes if a.name in rated))
        self.row_length = row_length or min(about.model.max_position_embeddings, _LONGEST_ROW)
        self._longest = min(self.row_length, about.model.max_position_embeddings)
        ways = mesh_ways(bundle.mesh, ("data", "fsdp"))
        self.rows = rows or ways * (1 if jax.default_backend() == "cpu" else 8)
        if self.rows < 1 or self.rows % ways or self.row_length < 1:
            problem = f"{self.rows} rows of {self.row_length} tokens a step"
            raise ConfigError(f"{problem}; cure: at least 1 token, and a multiple of {ways} rows (mesh data x fsdp)")
        self.counts = Counts()
        self._bundle, self._renderer = bundle, bundle.renderer(self.schema)
        self._outputs = [whole.names.index(name) for name in self.schema.names]

        def score(params, batch: Batch):
            return bundle.module.apply({"params": params}, *(x[0] for x in batch[:3]))

        self._score = jax.jit(score, out_shardings=NamedSharding(bundle.mesh, PartitionSpec()))

    def prepare(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]], *, skip: bool = False
    ) -> Chunk:
        """Renders and packs these assistant turns of each conversation; needs no device.

        Raises DataError: a turn that cannot be rendered, unless `skip` refuses it. One that is too long is refused.
        """
        places, examples, refused = [], [], {}
        for place, turn in ((place, turn) for place, wanted in enumerate(turns) for turn in wanted):
            conversation = conversations[place]
            try:
                tokens, root = self._renderer.reward_tokens(conversation, turn)
                whose = "a row has" if self._longest == self.row_length else "the model has positions for"
                reason = f"turns[{turn}]: {len(tokens)} tokens up to its end, and {whose} {self._longest}"
            except DataError as error:
                if not skip:
                    raise
                tokens, reason = None, error.reason
            if tokens is None or len(tokens) > self._longest:
                refused[place, turn] = Skipped(conversation.file, conversation.line, reason)
            else:
                examples.append(Example("rating", len(examples), tokens, root, *_NOTHING))
                places.append((place, turn))
        trees = grow(examples)
        return Chunk(tuple(places), trees, bucketed_rows(trees, row_lengths(self.row_length)), refused)

    def score(self, chunk: Chunk) -> np.ndarray:
        """Predicted ratings, float32 [E, A], attributes in the order of `schema`."""
        predicted = np.zeros((len(chunk.examples), len(self.schema)), np.float32)
        mesh, running = self._bundle.mesh, []
        with jax.set_mesh(mesh):
            for length, rows in chunk.rows.items():
                build = RowBuilder(chunk.trees, length, {})
                feed = Feeder(build, lambda axes: NamedSharding(mesh, partition_spec(axes)))
                for step in evaluation_steps(rows, self.rows):
                    running.append((build, step, self._score(self._bundle.params, feed(step))))  # not waited for
                    self.counts.places += length * self.rows
                self.counts.tokens += sum(part.length for row in rows for part in row)
                self.counts.shapes.add((self.rows, length))
        for build, step, outputs in running:
            for row, output in zip(step, np.asarray(outputs), strict=True):
                for example, place in build.layout(row).ends:
                    predicted[example.number] = output[place, self._outputs]
        self.counts.turns += len(chunk.examples)
        return predicted


def open_scorer(folder: str, options: argparse.Namespace) -> Scorer:
    """With `command.add_scoring_options`. Raises SteerjaxError: no such model, or options that do not fit it."""
    return Scorer(open_model(folder, options), row_length=options.row_length, rows=options.rows)


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


def assistant_turns(conversation: Conversation) -> list[int]:
    """Places of the assistant's turns."""
    return [place for place, turn in enumerate(conversation.turns) if turn.role == "assistant"]


def predicted_keys(predicted: np.ndarray, schema: Schema) -> dict:
    """What a turn says about a prediction [A]: the shortest decimals that are these float32 numbers, and the label.

    Raises DataError: one is not finite.
    """
    ratings = {name: float(str(value)) for name, value in zip(schema.names, predicted, strict=True)}
    for name, value in ratings.items():
        if not np.isfinite(value):
            raise DataError(f"the model predicts {value}", field=name, cure="check the model, or use another --dtype")
    return {"predicted_ratings": ratings, "predicted_label": format_label(ratings, schema)}
