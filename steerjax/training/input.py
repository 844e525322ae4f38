"""What the tasks' input has in common: renderer, sources, and rows put on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import Tokenizer, load_tokenizer
from steerjax.config import BatchConfig, DataConfig, Experiment
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, check_disjoint, load_conversations, split_by_prompt
from steerjax.data.packing import PromptGroup, Row
from steerjax.errors import ConfigError, DataError
from steerjax.parallel.rules import mesh_ways, partition_spec
from steerjax.schema import Schema


def make_renderer(experiment: Experiment, schema: Schema) -> Renderer:
    """Tokenizer and template of an experiment."""
    chat = experiment.chat
    return Renderer(
        tokenizer=load_tokenizer(chat.tokenizer),
        template=TEMPLATES[chat.template],
        schema=schema,
        system_prompt=None if chat.system_prompt == "default" else chat.system_prompt,
        control_strings=experiment.data.control_strings,
    )


def load_splits(data: DataConfig, schema: Schema) -> tuple[list[Conversation], list[Conversation], list[Skipped]]:
    """Training and validation conversations, no prompt in both, and what was skipped.

    Raises:
        DataError: a row that cannot be used, unless the experiment says to skip such rows.
    """
    load = functools.partial(
        load_conversations, schema=schema, format=data.format, on_bad_row=data.on_bad_row,
        on_duplicate=data.on_duplicate,
    )  # fmt: skip
    train, skipped = load(data.train)
    if not data.validation:
        return *split_by_prompt(train, data.validation_fraction, data.split_seed), skipped
    validation, more = load(data.validation)
    check_disjoint(train, validation)
    return train, validation, skipped + more


def each_usable(
    conversations: Sequence[Conversation], convert: Callable[[Conversation], object], *, skip: bool
) -> tuple[list, list[Skipped]]:
    """`convert` of every conversation, and those that it refused with a DataError.

    Args:
        skip: list what is refused, rather than raise.

    Raises:
        DataError: names the row; nothing usable is left.
    """
    converted, skipped = [], []
    for conversation in conversations:
        try:
            converted.append(convert(conversation))
        except DataError as error:
            error = error if error.file else error.at(conversation.file, conversation.line)
            if not skip:
                raise error from None
            skipped.append(Skipped(conversation.file, conversation.line, str(error)))
    if not converted:
        raise DataError("no usable example is left", cure="look at the rows that were skipped, and at row_length")
    return converted, skipped


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError when token ids could lie outside the embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"config.model.vocab_size {vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; "
            "cure: 0 takes the tokenizer's; a pretrained model wants the tokenizer it came with"
        )


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
        build: a row -> its arrays, a NamedTuple; of an empty row, padding.
        axes: the same NamedTuple of the logical axes of a batch [M, B/M, ...].
        micro_batches: M.
    """

    build: Callable[[Row], NamedTuple]
    axes: NamedTuple
    micro_batches: int
    mesh: Mesh

    @property
    def shardings(self):
        """How the arrays of a batch lie on the mesh."""
        return type(self.axes)(*(NamedSharding(self.mesh, partition_spec(axes)) for axes in self.axes))

    def __call__(self, rows: Sequence[Row]):
        """Rows -> a batch of sharded arrays."""
        M, B = self.micro_batches, len(rows)
        empty = self.build(())

        @functools.cache
        def built(row: int):
            return self.build(rows[row])

        def field(name: str, sharding: NamedSharding) -> jax.Array:
            shape = (M, B // M, *getattr(empty, name).shape)

            def shard(index):
                numbers = np.arange(B).reshape(M, B // M)[index[:2]]
                arrays = [getattr(built(int(row)), name)[index[2:]] for row in numbers.flat]
                return np.stack(arrays).reshape(*numbers.shape, *arrays[0].shape)

            return jax.make_array_from_callback(shape, sharding, shard)

        return type(empty)(*(field(n, s) for n, s in zip(empty._fields, self.shardings, strict=True)))

    def abstract(self, rows: int):
        """Shapes, dtypes and shardings of a batch of so many rows."""
        M = self.micro_batches

        def one(array, sharding):
            return jax.ShapeDtypeStruct((M, rows // M, *array.shape), array.dtype, sharding=sharding)

        empty = self.build(())
        return type(empty)(*map(one, empty, self.shardings))


def row_examples(groups: Sequence[PromptGroup], row: Row) -> list[int]:
    """Numbers of the examples in a row, in the order of its read-outs."""
    return [groups[s.group].branches[b].example for s in row for b in s.branches]
