"""The input of a run: rows -> conversations -> examples -> trees -> the rows of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding

from steerjax.chat.render import Renderer
from steerjax.data.batch import BatchConfig, BatchPlan, Feeder, RowBuilder
from steerjax.data.config import DataConfig
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, load_conversations, shared_prompts, split_by_prompt
from steerjax.data.packing import Row, check_fits, pack
from steerjax.data.trees import Example, Tree, grow
from steerjax.errors import ConfigError, DataError
from steerjax.objectives import Objective
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.parallel.rules import mesh_ways, partition_spec
from steerjax.schema import Schema


@dataclass(frozen=True)
class Splits:
    """Conversations of both splits, and what a user should hear of them.

    Attributes:
        said: facts for the summary.
    """

    train: Sequence[Conversation]
    validation: Sequence[Conversation]
    skipped: list[Skipped]
    said: dict[str, str]


def load_splits(data: DataConfig, schema: Schema) -> Splits:
    """Training and validation conversations.

    Raises:
        DataError: a row that cannot be used, unless the config says to skip such rows.
    """
    options = {"format": data.format, "on_bad_row": data.on_bad_row, "on_duplicate": data.on_duplicate}
    loaded = load_conversations(data.train, schema, **options)
    skipped, said, duplicates = list(loaded.skipped), {}, loaded.duplicates
    if data.validation:
        train, held = loaded.conversations, load_conversations(data.validation, schema, **options)
        validation, skipped, duplicates = held.conversations, skipped + held.skipped, duplicates + held.duplicates
        if both := shared_prompts(train, validation):
            said["warning"] = f"{both} prompts are in both training and validation rows"
    else:
        train, validation = split_by_prompt(loaded.conversations, data.validation_fraction, data.split_seed)
        if shared_prompts(train, validation):
            said["hold-out"] = "by row: all rows have one prompt"
    if duplicates:
        said["duplicates"] = f"{duplicates} rows stand twice ({data.on_duplicate})"
    return Splits(train, validation, skipped, said)


@dataclass(frozen=True, eq=False)
class Input:
    """What is trained and evaluated.

    Attributes:
        plan: the rows of each training step.
        validation, validation_rows: the trees of the validation split, packed.
        skipped: rows that were left out.
        said: facts for the summary.
    """

    plan: BatchPlan
    validation: tuple[Tree, ...]
    validation_rows: list[Row]
    skipped: list[Skipped]
    said: dict[str, str]


def make_input(
    splits: Splits,
    objectives: Sequence[Objective],
    batch: BatchConfig,
    limit: int,
    skip: bool,
    seed: int,
    renderer: Renderer,
) -> Input:
    """Every objective's examples of both splits, as trees.

    Args:
        limit: tokens that a model can tell apart by position; a longer example is a bad row.
        skip: leave bad rows out and list them, rather than raise.

    Raises:
        DataError: names the row; or nothing is left, or nothing that an objective can learn from.
    """
    skipped = list(splits.skipped)
    trees = []
    for name, conversations in ((TRAIN, splits.train), (VALIDATION, splits.validation)):
        examples: list[Example] = []
        for conversation in conversations:
            try:
                for objective in objectives:
                    found = objective.examples(conversation, name)
                    for example in found:
                        check_fits(len(example.tokens), batch.row_length)
                        check_position(len(example.tokens), limit)
                    examples += found
            except DataError as error:
                error = error.at(conversation.file, conversation.line)
                if not skip:
                    raise error from None
                skipped.append(Skipped(conversation.file, conversation.line, str(error)))
        trees.append(grow(examples))
    for objective in objectives:
        objective.check_data()
    said = dict(splits.said)
    if changed := sum(map(renderer.broken, (*splits.train, *splits.validation))):
        said["control strings"] = f"{changed} texts spell one; a zero-width character breaks it"
    train, validation = trees
    plan = BatchPlan(train, batch.rows, batch.row_length, seed)
    return Input(plan, validation, pack(validation, batch.row_length), skipped, said)


def check_position(tokens: int, limit: int) -> None:
    """Raises DataError where a text is longer than the model's positions."""
    if tokens > limit:
        cure = "shorten the row, or set config.data.on_bad_row='skip' to leave such rows out"
        raise DataError(f"{tokens} tokens, and model.max_position_embeddings is {limit}", cure=cure)


def check_batch(config: BatchConfig, mesh: Mesh) -> None:
    """Raises ConfigError when the mesh does not divide a micro-batch's rows or a row's tokens."""
    ways = mesh_ways(mesh, ("data", "fsdp"))
    for key, rows in (("rows / micro_batches", config.rows // config.micro_batches), ("evaluation", config.evaluated)):
        if rows % ways:
            raise ConfigError(
                f"config.batch: {key} is {rows}, and mesh axes data and fsdp cut it into {ways}; "
                f"cure: a multiple of {ways}"
            )
    if config.row_length % mesh_ways(mesh, "context"):
        raise ConfigError(
            f"config.batch.row_length {config.row_length} is not a multiple of config.mesh.context; cure: make it one"
        )


def make_feeder(
    trees: Sequence[Tree], objectives: Sequence[Objective], row_length: int, mesh: Mesh, micro_batches: int, states=None
) -> Feeder:
    """Rows of these trees, on the mesh.

    Args:
        states: a `cache.FrozenStates`, or None.
    """
    build = RowBuilder(trees, row_length, {o.name: o.arrays for o in objectives}, states)
    return Feeder(build, lambda axes: NamedSharding(mesh, partition_spec(axes)), micro_batches)
