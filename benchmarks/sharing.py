"""How many tokens and attention pairs a recipe saves by writing what examples share once.

    python benchmarks/sharing.py --config configs/sft.py --config.data.train=FILE --made_up_ratings

Counts all rows of config.data.train three ways: one row an example, the first user turn of a tree shared, and whole
trees as they are packed into rows of config.batch.row_length. With --made_up_ratings every assistant turn has ratings
drawn from a seed (OpenAssistant's samples have none).
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from absl import flags

from steerjax.chat.render import make_renderer
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import load_conversations
from steerjax.data.packing import pack, packing_statistics, unshared_rows
from steerjax.data.trees import grow
from steerjax.flags import run_experiment
from steerjax.objectives.objective import TRAIN
from steerjax.schema import Schema
from steerjax.training.config import Experiment
from steerjax.training.program import make_objectives
from steerjax.training.source import with_source


def made_up(conversation: Conversation, schema: Schema) -> Conversation:
    """With a rating of every attribute in every assistant turn; of one turn the same in all its threads."""

    def rated(turn: Turn) -> Turn:
        if turn.role != "assistant":
            return turn
        random = np.random.default_rng(zlib.crc32((turn.id or turn.content).encode()))
        ratings = {a.name: float(random.choice(a.labels)) for a in schema.attributes}
        return dataclasses.replace(turn, ratings=ratings)

    return dataclasses.replace(conversation, turns=tuple(map(rated, conversation.turns)))


def main(e: Experiment, with_made_up: bool) -> None:
    e, _ = with_source(e)
    schema, row_length = e.data.make_schema(), e.batch.row_length
    objectives = make_objectives(e, schema, make_renderer(e.chat, schema))
    loaded = load_conversations(e.data.train, schema, format=e.data.format, on_bad_row=e.data.on_bad_row)
    conversations = [made_up(c, schema) if with_made_up else c for c in loaded.conversations]
    found = [example for c in conversations for o in objectives for example in o.examples(c, TRAIN)]
    examples = [example for example in found if len(example.tokens) <= row_length]
    trees = grow(examples)
    alone = packing_statistics(trees, unshared_rows(trees), row_length)
    packed = packing_statistics(trees, pack(trees, row_length), row_length)
    roots = [[min(e.root for e in tree.examples)] * (len(tree.examples) - 1) for tree in trees]
    print(f"{len(conversations)} conversations, {len(examples)} examples in {len(trees)} trees", end="")
    print(f"; {len(found) - len(examples)} longer than {row_length} tokens are left out")
    print(f"{'':24}{'tokens':>12}{'ratio':>8}{'pairs':>14}{'ratio':>8}")
    for name, tokens, pairs in (
        ("one row an example", alone.tokens, alone.pairs),
        ("first turn shared", alone.tokens - sum(map(sum, roots)), None),
        ("whole trees", packed.tokens, packed.pairs),
    ):
        attention = "" if pairs is None else f"{pairs:14,}{alone.pairs / pairs:8.2f}"
        print(f"{name:24}{tokens:12,}{alone.tokens / tokens:8.2f}{attention}")
    print(f"{packed.rows} rows of {row_length} tokens, {packed.fill:.1%} filled")


if __name__ == "__main__":
    ratings = flags.DEFINE_bool("made_up_ratings", False, "Rate every assistant turn from a seed.")
    run_experiment(lambda experiment: main(experiment, ratings.value), __doc__, required=())
