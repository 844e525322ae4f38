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

from steerjax.bundle.opening import OpenModel
from steerjax.chat.render import Renderer
from steerjax.data.batch import evaluation_steps
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped
from steerjax.data.packing import PromptGroup, Row, Segment, pack_segments, share_prompts, split_group
from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.hf.config import read_config
from steerjax.hf.description import ModelDescription
from steerjax.parallel.rules import mesh_ways
from steerjax.schema import SCHEMAS, STEERLM, Schema, format_label
from steerjax.training.input import row_examples
from steerjax.training.reward import make_feeder, reward_inputs

_SHORTEST_ROW = 1024  # tokens; shorter conversations share a row of this length
_LONGEST_ROW = 4096  # tokens, unless the user says otherwise
_CHUNK = 1024  # conversations that `predict` packs together
_TOKENS_PER_RESPONSE = 16  # of a row; more responses than that go into another row


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
        groups: their tokens, what they share written once.
        rows: row length -> packed rows.
        refused: turns that are no example.
    """

    examples: tuple[tuple[int, int], ...]
    groups: tuple[PromptGroup, ...]
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
        fill = self.tokens / max(1, self.places)
        shapes = ", ".join(f"{rows} x {length}" for rows, length in sorted(self.shapes))
        return f"{self.turns} turns, {self.tokens:,} tokens, rows {fill:.1%} filled, compiled for {shapes or 'nothing'}"


def model_schema(description: ModelDescription) -> Schema:
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
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ModelError(
            f"'{description.path}': its outputs are {', '.join(labels)}, and {unknown[0]} is no attribute\n"
            f"  cure: name them in config.json's id2label, from {', '.join(known)}"
        )
    return Schema(tuple(known[label] for label in labels))


def rated_schema(description: ModelDescription) -> Schema:
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


def responses_per_row(row_length: int) -> int:
    """Most responses in a row."""
    return max(1, row_length // _TOKENS_PER_RESPONSE)


def bucketed_rows(groups: Sequence[PromptGroup], lengths: Sequence[int]) -> dict[int, list[Row]]:
    """Packs the groups into rows of a few lengths, each segment into the shortest that holds it.

    What is left of a long row is filled with short segments.

    Args:
        lengths: ascending; the last holds every branch with its prompt.
    """
    most = responses_per_row(lengths[0])
    segments: list[Segment] = [s for i, g in enumerate(groups) for s in split_group(i, g, lengths[-1], most)]
    rows: dict[int, list[Row]] = {}
    for shorter, length in reversed(list(zip((0, *lengths), lengths, strict=False))):
        packed = pack_segments(segments, length, responses_per_row(length))
        needed = [row for row in packed if row[0].length > shorter]  # the longest segment stands first
        segments = [segment for row in packed if row[0].length <= shorter for segment in row]
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
        opened: a reward model.
        row_length: 0 takes the model's longest context, at most 4096.
        rows: 0 takes 8 for each part of the mesh that rows are cut into, on a CPU 1.
        control_strings: see `Renderer`.

    Raises:
        ModelError: no reward model. ConfigError: rows that the mesh does not divide, a bad row length.
    """

    def __init__(self, opened: OpenModel, *, row_length: int = 0, rows: int = 0, control_strings: str = "refuse"):
        self.description = about = opened.description
        model = opened.model
        self.schema = rated_schema(about)
        self.row_length = row_length or min(about.model.max_position_embeddings, _LONGEST_ROW)
        ways = mesh_ways(opened.mesh, ("data", "fsdp"))
        self.rows = rows or ways * (1 if jax.default_backend() == "cpu" else 8)
        if self.rows < 1 or self.rows % ways or self.row_length < 1:
            raise ConfigError(
                f"{self.rows} rows of {self.row_length} tokens a step; cure: at least 1 token, and a multiple of "
                f"{ways} rows (mesh axes data and fsdp)"
            )
        self.counts = Counts()
        self._lengths = row_lengths(self.row_length)
        self._renderer = Renderer(
            about.tokenizer, about.template, self.schema, about.system_prompt, control_strings
        )  # fmt: skip
        self._outputs = [model_schema(about).names.index(name) for name in self.schema.names]
        self._params, self._mesh = opened.params, opened.mesh
        self._score = jax.jit(
            lambda params, batch: model.apply({"params": params}, reward_inputs(jax.tree.map(lambda x: x[0], batch))),
            out_shardings=NamedSharding(opened.mesh, PartitionSpec()),
        )

    def prepare(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[int]], *, skip: bool = False
    ) -> Chunk:
        """Renders and packs; needs no device.

        Args:
            turns: of each conversation, the assistant turns to rate.
            skip: refuse a turn with a control string, rather than raise. A turn that is too long is always refused.

        Raises:
            DataError: a turn that cannot be rendered; names file and line.
        """
        examples, prompts, responses, refused = [], [], [], []
        for place, (conversation, wanted) in enumerate(zip(conversations, turns, strict=True)):
            for turn in wanted:
                try:
                    prompt, response = self._renderer.reward_text_parts(conversation, turn)
                except DataError as error:
                    if not skip:
                        raise
                    refused.append(Refused(place, turn, f"field '{error.field}': {error.message}"))
                    continue
                tokens = len(prompt) + len(response)
                if tokens > self.row_length:
                    reason = f"turns[{turn}]: {tokens} tokens up to its end, and a row has {self.row_length}"
                    refused.append(Refused(place, turn, reason))
                    continue
                examples.append((place, turn))
                prompts.append(prompt)
                responses.append(response)
        none = np.zeros((len(examples), 0), np.float32)
        groups = share_prompts(prompts, responses, none, none > 0, self.row_length)
        return Chunk(tuple(examples), groups, bucketed_rows(groups, self._lengths), tuple(refused))

    def score(self, chunk: Chunk) -> np.ndarray:
        """Predicted ratings, float32 [E, A], attributes in the order of `schema`."""
        predicted = np.zeros((len(chunk.examples), len(self.schema)), np.float32)
        running = []
        with jax.set_mesh(self._mesh):
            for length, rows in chunk.rows.items():
                feed = make_feeder(chunk.groups, length, responses_per_row(length), 1, self._mesh)
                for step in evaluation_steps(rows, self.rows):
                    running.append((step, self._score(self._params, feed(step))))  # not waited for
                    self.counts.places += length * self.rows
                self.counts.tokens += sum(segment.length for row in rows for segment in row)
                self.counts.shapes |= {(self.rows, length)}
        for step, outputs in running:
            for row, output in zip(step, np.asarray(outputs), strict=True):
                examples = row_examples(chunk.groups, row)
                predicted[examples] = output[: len(examples), self._outputs]
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
        skip: also those with a control string.

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
