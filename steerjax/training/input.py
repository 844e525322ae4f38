"""From conversations to sharded batches: the glue between data, chat and the mesh."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from steerjax.attributes import AttributeSchema
from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import Tokenizer, load_tokenizer
from steerjax.config import BatchConfig, Experiment
from steerjax.data.batch import Batch, row_arrays
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, check_disjoint, load_conversations, split_by_prompt
from steerjax.data.packing import Branch, PromptGroup, Row, check_fits
from steerjax.errors import ConfigError, DataError
from steerjax.parallel.rules import mesh_ways, partition_spec


@dataclass(frozen=True)
class RewardData:
    """Rated responses of one split, E examples.

    Attributes:
        groups: the examples' tokens, by prompt.
        ratings: float32 [E, A], 0 where missing.
        mask: bool [E, A].
        lengths: int [E], characters of the response.
        ids: of the conversations.
    """

    groups: tuple[PromptGroup, ...]
    ratings: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    ids: tuple[str, ...]

    def mean_ratings(self) -> np.ndarray:
        """float32 [A]: mean over the present ratings; 0 for an attribute without any."""
        counts = np.maximum(self.mask.sum(0), 1)
        return (self.ratings.sum(0, where=self.mask, dtype=np.float64) / counts).astype(np.float32)


def make_renderer(experiment: Experiment, schema: AttributeSchema) -> Renderer:
    """Tokenizer and template of an experiment."""
    chat = experiment.chat
    return Renderer(
        tokenizer=load_tokenizer(chat.tokenizer),
        template=TEMPLATES[chat.template],
        schema=schema,
        system_prompt=None if chat.system_prompt == "default" else chat.system_prompt,
        control_strings=experiment.data.control_strings,
    )


def load_splits(
    experiment: Experiment, schema: AttributeSchema, renderer: Renderer
) -> tuple[RewardData, RewardData, list[Skipped]]:
    """Training and validation examples, no prompt in both, and what was skipped.

    Raises:
        DataError: a row that cannot be used, unless the experiment says to skip such rows.
    """
    data = experiment.data
    load = functools.partial(
        load_conversations, schema=schema, format=data.format, on_bad_row=data.on_bad_row,
        on_duplicate=data.on_duplicate,
    )  # fmt: skip
    train, skipped = load(data.train)
    if data.validation:
        validation, more = load(data.validation)
        skipped += more
        check_disjoint(train, validation)
    else:
        train, validation = split_by_prompt(train, data.validation_fraction, data.split_seed)
    splits = []
    for conversations in (train, validation):
        split, more = reward_data(
            conversations, renderer, schema, experiment.batch.row_length, skip=data.on_bad_row == "skip"
        )
        splits.append(split)
        skipped += more
    return *splits, skipped


def reward_data(
    conversations: Sequence[Conversation], renderer: Renderer, schema: AttributeSchema, row_length: int, *, skip: bool
) -> tuple[RewardData, list[Skipped]]:
    """Renders every rated assistant turn as an example; those with the same prompt tokens form a group.

    Args:
        row_length: tokens; a longer example is a bad row.
        skip: leave bad rows out and list them, rather than raise.

    Raises:
        DataError: names the row.
    """
    branches: dict[bytes, list[Branch]] = {}
    examples: list[tuple[np.ndarray, np.ndarray, int, str]] = []
    skipped: list[Skipped] = []
    for conversation in conversations:
        rated = [i for i, turn in enumerate(conversation.turns) if turn.ratings]
        try:
            if not rated:
                raise DataError("no rated response", cure="rate a turn, or leave the row out with on_bad_row='skip'")
            parts = [renderer.reward_text_parts(conversation, turn) for turn in rated]
            for prompt, response in parts:
                check_fits(len(prompt), len(response), row_length)
        except DataError as error:
            error = error if error.file else error.at(conversation.file, conversation.line)
            if not skip:
                raise error from None
            skipped.append(Skipped(conversation.file, conversation.line, str(error)))
            continue
        for turn, (prompt, response) in zip(rated, parts, strict=True):
            ratings, mask = _rating_arrays(conversation.turns[turn].ratings, schema)
            branch = Branch(response, ratings, mask, example=len(examples))
            branches.setdefault(prompt.tobytes(), []).append(branch)
            examples.append((ratings, mask, len(conversation.turns[turn].content), conversation.id))
    if not examples:
        raise DataError("no usable example is left", cure="look at the rows that were skipped, and at row_length")
    ratings, masks, lengths, ids = zip(*examples, strict=True)
    groups = tuple(PromptGroup(np.frombuffer(p, np.int32), tuple(b)) for p, b in branches.items())
    return RewardData(groups, np.stack(ratings), np.stack(masks), np.array(lengths), ids), skipped


def _rating_arrays(ratings, schema: AttributeSchema) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([ratings.get(name, 0.0) for name in schema.names], np.float32)
    return values, np.array([name in ratings for name in schema.names])


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError when token ids could lie outside the embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"config.model.vocab_size {vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; "
            "cure: 0 takes the tokenizer's"
        )


BATCH_AXES = Batch(
    tokens=(None, "batch", "length"),
    positions=(None, "batch", "length"),
    segments=(None, "batch", "length"),
    branches=(None, "batch", "length"),
    ends=(None, "batch", None),
    examples=(None, "batch", None),
    ratings=(None, "batch", None, None),
    mask=(None, "batch", None, None),
)


def batch_shardings(mesh: Mesh) -> Batch:
    """How the arrays of a batch [M, B/M, ...] lie on the mesh."""
    return Batch(*(NamedSharding(mesh, partition_spec(axes)) for axes in BATCH_AXES))


def check_batch(config: BatchConfig, evaluation_rows: int, mesh: Mesh) -> None:
    """Raises ConfigError when the mesh does not divide a micro-batch's rows or a row's tokens."""
    ways = mesh_ways(mesh, ("data", "fsdp"))
    for key, rows in (("rows / micro_batches", config.rows // config.micro_batches), ("evaluation", evaluation_rows)):
        if rows % ways:
            raise ConfigError(
                f"config.batch: {key} is {rows}, and mesh axes data and fsdp cut it into {ways}; "
                f"cure: a multiple of {ways}"
            )
    if config.row_length % mesh_ways(mesh, "context"):
        raise ConfigError(
            f"config.batch.row_length {config.row_length} is not a multiple of config.mesh.context; cure: make it one"
        )


@dataclass(frozen=True)
class Feeder:
    """Puts packed rows on the mesh. Each process builds only the rows that its devices hold.

    Attributes:
        micro_batches: M; a batch is [M, B/M, ...].
    """

    groups: tuple[PromptGroup, ...]
    row_length: int
    responses_per_row: int
    micro_batches: int
    mesh: Mesh

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Rows -> a batch of sharded arrays."""
        M, B = self.micro_batches, len(rows)
        empty = row_arrays(self.groups, (), self.row_length, self.responses_per_row)

        @functools.cache
        def built(row: int) -> Batch:
            return row_arrays(self.groups, rows[row], self.row_length, self.responses_per_row)

        def field(name: str, sharding: NamedSharding) -> jax.Array:
            shape = (M, B // M, *getattr(empty, name).shape)

            def shard(index):
                numbers = np.arange(B).reshape(M, B // M)[index[:2]]
                arrays = [getattr(built(int(row)), name)[index[2:]] for row in numbers.flat]
                return np.stack(arrays).reshape(*numbers.shape, *arrays[0].shape)

            return jax.make_array_from_callback(shape, sharding, shard)

        return Batch(*(field(n, s) for n, s in zip(Batch._fields, batch_shardings(self.mesh), strict=True)))


def row_examples(groups: Sequence[PromptGroup], row: Row) -> list[int]:
    """Numbers of the examples in a row, in the order of its read-outs."""
    return [groups[s.group].branches[b].example for s in row for b in s.branches]
