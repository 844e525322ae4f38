"""The input of a run: rows -> conversations -> examples -> trees -> the rows of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from steerjax.chat.render import Renderer
from steerjax.chat.tokenizer import missing_markers
from steerjax.data.batch import BatchPlan, Feeder, RowBuilder
from steerjax.data.config import BatchConfig
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped, load_conversations, shared_prompts, split_by_prompt
from steerjax.data.packing import Row, pack
from steerjax.data.trees import Example, Tree, grow
from steerjax.errors import ConfigError, DataError
from steerjax.objectives import Objective
from steerjax.objectives.objective import TRAIN, VALIDATION
from steerjax.parallel.rules import mesh_ways, on_mesh
from steerjax.training.config import Experiment


@dataclass(frozen=True, eq=False)
class Input:
    """What is trained (`plan`) and evaluated, rows that were left out, and facts for the summary (`said`)."""

    plan: BatchPlan
    validation: tuple[Tree, ...]
    validation_rows: list[Row]
    skipped: list[Skipped]
    said: dict[str, str]


@dataclass(frozen=True, eq=False)
class SourceGroup:
    """Conversations of the same sources, and the names of the objectives that learn from them."""

    objectives: list[str]
    splits: list[list[Conversation]]  # training, validation


def load_parts(e: Experiment) -> tuple[list[SourceGroup], list[Skipped], dict[str, str]]:
    """The data of every objective, rows that were left out, and facts for the summary.

    What has no validation of its own is held out together, so that no file's training rows have a prompt of another's
    validation. Raises DataError: a row that cannot be used, unless the config says to skip such rows.
    """
    data, schema, names = e.data, e.data.make_schema(), {}
    for name, own in e.objective.items():
        chosen = own if own.train else data
        names.setdefault((chosen.train, chosen.validation, chosen.format), []).append(name)
    options = {"on_bad_row": data.on_bad_row, "on_duplicate": data.on_duplicate}
    parts, loaded = [], []
    for (*sources, format), objectives in names.items():
        found = [load_conversations(each, schema, format=format, **options) for each in sources if each]
        parts.append(SourceGroup(objectives, [one.conversations for one in found]))
        loaded += found
    whole = [part.splits for part in parts if len(part.splits) == 1]
    if whole:
        rows = [conversation for splits in whole for conversation in splits[0]]
        held_out = set(map(id, split_by_prompt(rows, data.validation_fraction, data.split_seed)[1]))
        for splits in whole:
            splits[:] = ([c for c in splits[0] if (id(c) in held_out) == there] for there in (False, True))
    said = {}
    if both := shared_prompts(*([c for part in parts for c in part.splits[i]] for i in range(2))):
        said["warning"] = f"{both} prompts are in both training and validation rows"
        if len(whole) == len(parts):
            said["warning"] = "all rows have one prompt, so rows are held out"
    if duplicates := sum(one.duplicates for one in loaded):
        said["duplicates"] = f"{duplicates} rows stand twice ({data.on_duplicate})"
    if unread := dict.fromkeys(name for one in loaded for name in one.unread):
        where = "config.data.attributes names what is rated, and ratings beside 'turns' or of a pair stand in the turns"
        said["not read"] = f"{', '.join(unread)}: numbers; {where}"
    return parts, [row for one in loaded for row in one.skipped], said


def make_input(e: Experiment, objectives: Sequence[Objective], renderer: Renderer) -> Input:
    """Every objective's examples of both splits, as trees.

    Raises:
        DataError: names the row; or nothing is left, or nothing that an objective can learn from.
    """
    parts, skipped, said = load_parts(e)
    trees, changed = [], 0

    def refuse(error: DataError, row: Conversation, name: str = "") -> None:
        if e.data.on_bad_row == "error":
            raise error.at(row.file, row.line) from None
        skipped.append(Skipped(row.file, row.line, f"{name}: {error.reason}" if name else error.reason))

    for number, split in enumerate((TRAIN, VALIDATION)):
        examples: list[Example] = []
        for part in parts:
            learners = [o for o in objectives if o.name in part.objectives]
            waiting = part.splits[number][::-1]
            part.splits[number].clear()
            while waiting:  # each is let go once it is read, so that memory does not hold text and tokens of all
                conversation = waiting.pop()
                try:
                    changed += renderer.broken(conversation)
                except DataError as error:
                    refuse(error, conversation)
                    continue
                for objective in learners:  # what one cannot use another may
                    try:
                        objective.check_row(conversation)
                        examples += objective.examples(conversation, split)
                    except DataError as error:
                        refuse(error, conversation, objective.name if len(learners) > 1 else "")
        trees.append(grow(examples))
    try:
        for objective in objectives:
            objective.check_data()
    except DataError as error:
        more = f"\n  not read: {said['not read']}" if "not read" in said else ""
        if skipped:
            first = f"{skipped[0].file}:{skipped[0].line}: {skipped[0].reason}"
            more = f"; {len(skipped)} rows were skipped, the first is {first}{more}"
        raise error.but(message=error.message + more) from None
    if missing := missing_markers(renderer.tokenizer, renderer.template):
        said["markers"] = f"{', '.join(missing)}: plain text to this tokenizer"
    if changed:
        said["control strings"] = f"{changed} texts spell one; a zero-width character breaks it"
    plan = BatchPlan(trees[0], e.batch.rows, e.batch.row_length, e.train.seed)
    return Input(plan, trees[1], pack(trees[1], e.batch.row_length), skipped, said)


def check_batch(config: BatchConfig, mesh: Mesh) -> None:
    """Raises ConfigError when the mesh does not divide a micro-batch's rows or a row's tokens."""
    rows = config.rows // config.micro_batches
    for what, size, axes in (
        ("rows / micro_batches", rows, ("data", "fsdp")),
        ("evaluation_rows", config.evaluated, ("data", "fsdp")),
        ("row_length", config.row_length, ("context",)),
    ):
        if size % (ways := mesh_ways(mesh, axes)):
            words = f"config.batch: {what} is {size}, and mesh axes {' and '.join(axes)} cut it into {ways}"
            raise ConfigError(f"{words}; cure: a multiple of {ways}")


def make_feeder(
    trees: Sequence[Tree], objectives: Sequence[Objective], row_length: int, mesh: Mesh, micro_batches: int, states=None
) -> Feeder:
    """Rows of these trees, on the mesh; `states` is a `cache.FrozenStates`, or None."""
    build = RowBuilder(trees, row_length, {o.name: o.arrays for o in objectives}, states)
    return Feeder(build, on_mesh(mesh), micro_batches)
