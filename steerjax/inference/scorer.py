"""Predicted ratings of assistant turns: rendered, packed so that what they share is computed once, and scored.

A chunk of conversations is the unit of work. What is computed follows from the chunk alone, so the same chunk gives the
same bits again on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from steerjax.bundle import Bundle
from steerjax.data.batch import Batch, Feeder, RowBuilder, evaluation_steps
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped
from steerjax.data.packing import Row, fill, parts_of
from steerjax.data.trees import Example, Tree, grow
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.hf.config_json import read_config
from steerjax.hf.description import Description
from steerjax.parallel.rules import mesh_ways, partition_spec
from steerjax.schema import SCHEMAS, STEERLM, Schema, format_label

_SHORTEST_ROW = 1024  # tokens; shorter conversations share a row of this length
_LONGEST_ROW = 4096  # tokens, unless the user says otherwise
_CHUNK = 1024  # conversations that `predict` packs together
_NOTHING = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)  # is learnt


@dataclass(frozen=True)
class Refused:
    """A turn without a prediction: index of the conversation in its chunk, index of the turn, and why."""

    conversation: int
    turn: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Conversations made ready for the model. E examples.

    Attributes:
        examples: (conversation, turn) of each.
        trees: their tokens, what they share written once.
        rows: row length -> packed rows.
        refused: turns that are no example.
    """

    examples: tuple[tuple[int, int], ...]
    trees: tuple[Tree, ...]
    rows: Mapping[int, Sequence[Row]]
    refused: tuple[Refused, ...]


@dataclass
class Counts:
    """What was computed so far.

    Attributes:
        turns: that have a prediction.
        tokens: in packed rows, without padding.
        places: with padding.
        shapes: (rows, row length) that were compiled.
    """

    turns: int = 0
    tokens: int = 0
    places: int = 0
    shapes: frozenset[tuple[int, int]] = frozenset()

    def __str__(self) -> str:
        filled = self.tokens / max(1, self.places)
        shapes = ", ".join(f"{rows} x {length}" for rows, length in sorted(self.shapes))
        return (
            f"{self.turns} turns, {self.tokens:,} tokens, rows {filled:.1%} filled, compiled for {shapes or 'nothing'}"
        )


def model_schema(description: Description) -> Schema:
    """The attributes that a reward model predicts, in the order of its outputs.

    Raises:
        ModelError: a chat model, or outputs without the names of attributes.
    """
    if description.kind != "reward":
        raise ModelError(f"'{description.path}' is a {description.kind} model\n  cure: give a reward model")
    if description.schema is not None:
        return description.schema
    known = {attribute.name: attribute for schema in SCHEMAS.values() for attribute in schema.attributes}
    labels = read_config(description.path).labels
    if unknown := [label for label in labels if label not in known]:
        raise ModelError(
            f"'{description.path}': its outputs are {', '.join(labels)}, and the range of {unknown[0]} is not known\n"
            f"  cure: a steerjax.json with the attributes, or in config.json's id2label names from {', '.join(known)}"
        )
    return Schema(tuple(known[label] for label in labels))


def rated_schema(description: Description) -> Schema:
    """The attributes of `model_schema` that had a rating in the model's training data; all, if it does not say."""
    schema = model_schema(description)
    rated = description.provenance.get("rated_attributes")
    return schema if rated is None else Schema(tuple(a for a in schema.attributes if a.name in rated))


def reading_schema(schema: Schema) -> Schema:
    """For reading files: a person may have rated attributes that the model does not know."""
    others = tuple(attribute for attribute in STEERLM.attributes if attribute.name not in schema.names)
    return Schema(schema.attributes + others)


def row_lengths(longest: int) -> tuple[int, ...]:
    """Lengths of packed rows, ascending: powers of two from 1024 tokens, and the longest."""
    lengths = [longest]
    length = _SHORTEST_ROW
    while length < longest:
        lengths.insert(-1, length)
        length *= 2
    return tuple(lengths)


def bucketed_rows(trees: Sequence[Tree], lengths: Sequence[int]) -> dict[int, list[Row]]:
    """Packs the trees into rows of a few lengths, each part into the shortest that holds it.

    What is left of a long row is filled with short parts.

    Args:
        lengths: ascending; the last holds every example.
    """
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
    """Scores chunks of conversations with a reward model.

    Attributes:
        description: of the model.
        schema: the attributes that are predicted (`rated_schema`).
        row_length: tokens; a longer conversation has no prediction.
        rows: packed rows a step.
        counts: see `Counts`.

    Args:
        bundle: a reward model.
        row_length: 0 takes the model's longest context, at most 4096.
        rows: 0 takes 8 for each part of the mesh that rows are cut into, on a CPU 1.

    Raises:
        ModelError: no reward model. ConfigError: rows that the mesh does not divide, a bad row length.
    """

    def __init__(self, bundle: Bundle, *, row_length: int = 0, rows: int = 0):
        self.description = about = bundle.description
        self.schema = rated_schema(about)
        self.row_length = row_length or min(about.model.max_position_embeddings, _LONGEST_ROW)
        ways = mesh_ways(bundle.mesh, ("data", "fsdp"))
        self.rows = rows or ways * (1 if jax.default_backend() == "cpu" else 8)
        if self.rows < 1 or self.rows % ways or self.row_length < 1:
            raise ConfigError(
                f"{self.rows} rows of {self.row_length} tokens a step; cure: at least 1 token, and a multiple of "
                f"{ways} rows (mesh axes data and fsdp)"
            )
        self.counts = Counts()
        self._lengths = row_lengths(self.row_length)
        self._renderer = bundle.renderer(self.schema)
        self._outputs = [model_schema(about).names.index(name) for name in self.schema.names]
        self._bundle = bundle

        def score(params, batch: Batch):
            inputs = (x[0] for x in (batch.tokens, batch.positions, batch.until))
            return bundle.module.apply({"params": params}, *inputs)

        self._score = jax.jit(score, out_shardings=NamedSharding(bundle.mesh, PartitionSpec()))

    def prepare(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]], *, skip: bool = False
    ) -> Chunk:
        """Renders and packs; needs no device.

        Args:
            turns: of each conversation, the assistant turns to rate.
            skip: refuse a turn that cannot be rendered, rather than raise. One that is too long is always refused.

        Raises:
            DataError: a turn that cannot be rendered; names file and line.
        """
        places, examples, refused = [], [], []
        for place, (conversation, wanted) in enumerate(zip(conversations, turns, strict=True)):
            for turn in wanted:
                try:
                    tokens, root = self._renderer.reward_tokens(conversation, turn)
                except DataError as error:
                    if not skip:
                        raise
                    refused.append(Refused(place, turn, f"field '{error.field}': {error.message}"))
                    continue
                if len(tokens) > self.row_length:
                    reason = f"turns[{turn}]: {len(tokens)} tokens up to its end, and a row has {self.row_length}"
                    refused.append(Refused(place, turn, reason))
                    continue
                examples.append(Example("rating", len(examples), tokens, root, *_NOTHING))
                places.append((place, turn))
        trees = grow(examples)
        return Chunk(tuple(places), trees, bucketed_rows(trees, self._lengths), tuple(refused))

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
                self.counts.shapes |= {(self.rows, length)}
        for build, step, outputs in running:
            for row, output in zip(step, np.asarray(outputs), strict=True):
                for example, place in build.layout(row).ends:
                    predicted[example.number] = output[place, self._outputs]
        self.counts.turns += len(chunk.examples)
        return predicted


def predict(
    scorer: Scorer,
    conversations: Sequence[Conversation],
    turns: Sequence[Sequence[int]],
    skipped: list[Skipped],
    *,
    skip: bool,
) -> tuple[list[tuple[Conversation, int]], np.ndarray]:
    """(conversation, turn) of every turn that could be rated, and their predictions [E, A].

    Args:
        turns: of each conversation.
        skipped: turns that could not be rated are added to it.
        skip: also those that cannot be rendered.

    Raises:
        DataError: names the row.
    """
    examples, predicted = [], []
    for begin in range(0, len(conversations), _CHUNK):
        part = conversations[begin : begin + _CHUNK]
        chunk = scorer.prepare(part, turns[begin : begin + _CHUNK], skip=skip)
        skipped += [Skipped(part[r.conversation].file, part[r.conversation].line, r.reason) for r in chunk.refused]
        examples += [(part[place], turn) for place, turn in chunk.examples]
        predicted.append(scorer.score(chunk))
    return examples, np.concatenate(predicted) if predicted else np.zeros((0, len(scorer.schema)), np.float32)


def assistant_turns(conversation: Conversation) -> list[int]:
    """Indices of the assistant's turns."""
    return [index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]


def predicted_keys(predicted: np.ndarray, schema: Schema) -> dict:
    """What a turn of the conversation format says about a prediction [A]: raw, and rounded as a label.

    The raw numbers are the shortest decimals that are these float32 numbers.

    Raises:
        DataError: one is not finite.
    """
    for value, name in zip(predicted, schema.names, strict=True):
        if not np.isfinite(value):
            raise DataError(f"the model predicts {value}", field=name, cure="check the model, or use another --dtype")
    ratings = {name: float(str(value)) for name, value in zip(schema.names, predicted, strict=True)}
    return {"predicted_ratings": ratings, "predicted_label": format_label(ratings, schema)}
