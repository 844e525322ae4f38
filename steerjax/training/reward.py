"""The reward model as a task: rated responses in, masked mean squared error."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from steerjax.chat.render import Renderer
from steerjax.config import Experiment
from steerjax.data.batch import Batch, BatchPlan, evaluation_steps, row_arrays
from steerjax.data.conversation import Conversation
from steerjax.data.loading import Skipped
from steerjax.data.packing import Branch, PromptGroup, check_fits, pack, packing_statistics, share_prompts
from steerjax.errors import DataError
from steerjax.models.attention.mask import Layout
from steerjax.models.reward_head import RewardInputs, RewardModel, initial_head
from steerjax.objectives.regression import attribute_squared_errors, masked_squared_error
from steerjax.report.page import format_table, write_report
from steerjax.report.results import EvaluationResult, evaluate_predictions
from steerjax.schema import Schema
from steerjax.training.input import Feeder, each_usable, load_splits, row_examples
from steerjax.training.task import Evaluation, make_compute

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


@dataclass(frozen=True)
class RewardData:
    """Rated responses of one split, E examples.

    Attributes:
        groups: the examples' tokens, what they share written once.
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


def reward_data(
    conversations: Sequence[Conversation], renderer: Renderer, schema: Schema, row_length: int, *, skip: bool
) -> tuple[RewardData, list[Skipped]]:
    """Renders every rated assistant turn as an example.

    Args:
        row_length: tokens; a longer example is a bad row.
        skip: leave bad rows out and list them, rather than raise.

    Raises:
        DataError: names the row.
    """

    def convert(conversation: Conversation):
        rated = [i for i, turn in enumerate(conversation.turns) if turn.ratings]
        if not rated:
            raise DataError("no rated response", cure="rate a turn, or leave the row out with on_bad_row='skip'")
        parts = [renderer.reward_text_parts(conversation, turn) for turn in rated]
        for prompt, response in parts:
            check_fits(len(prompt), len(response), row_length)
        turns = [conversation.turns[turn] for turn in rated]
        return [
            (*tokens, *_rating_arrays(turn.ratings, schema), len(turn.content), conversation.id)
            for tokens, turn in zip(parts, turns, strict=True)
        ]

    converted, skipped = each_usable(conversations, convert, skip=skip)
    prompts, responses, ratings, masks, lengths, ids = zip(*(x for rows in converted for x in rows), strict=True)
    ratings, mask = np.stack(ratings), np.stack(masks)
    groups = share_prompts(prompts, responses, ratings, mask, row_length)
    return RewardData(groups, ratings, mask, np.array(lengths), ids), skipped


def _rating_arrays(ratings, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([ratings.get(name, 0.0) for name in schema.names], np.float32)
    return values, np.array([name in ratings for name in schema.names])


def reward_inputs(batch: Batch) -> RewardInputs:
    """What the model sees of a batch (everything but the ratings)."""
    return RewardInputs(batch.tokens, batch.positions, Layout(batch.segments, batch.branches), batch.ends)


def dummy_inputs() -> RewardInputs:
    """One token; enough to initialise a reward model."""
    one = np.zeros((1, 1), np.int32)
    return RewardInputs(one, one, Layout(one, one), one)


def make_feeder(
    groups: Sequence[PromptGroup], row_length: int, responses_per_row: int, micro_batches: int, mesh: Mesh
) -> Feeder:
    """Packed rows of these groups, on the mesh."""
    build = functools.partial(row_arrays, groups, row_length=row_length, responses_per_row=responses_per_row)
    return Feeder(build, BATCH_AXES, micro_batches, mesh)


def make_loss(model: RewardModel, weights: np.ndarray, average: str):
    """(params, batch) -> (sum, (count, {"mse": (squared errors [A], ratings [A])})), all float32."""

    def loss(params, batch: Batch):
        predictions = model.apply({"params": params}, reward_inputs(batch))
        total, count = masked_squared_error(predictions, batch.ratings, batch.mask, weights, average)
        return total, (count, {"mse": attribute_squared_errors(predictions, batch.ratings, batch.mask)})

    return loss


class RewardTask:
    """See `training.task.Task`.

    Attributes:
        train, validation: the two splits.
        data: a function of (groups) -> (plan, feeders), so that cached states can take the tokens' place.
    """

    kind = "reward"
    inputs = (dummy_inputs(),)

    def __init__(self, experiment: Experiment, schema: Schema, renderer: Renderer, mesh: Mesh):
        e = experiment
        *splits, self.skipped = load_splits(e.data, schema)
        data = []
        for conversations in splits:
            split, skipped = reward_data(
                conversations, renderer, schema, e.batch.row_length, skip=e.data.on_bad_row == "skip"
            )
            data.append(split)
            self.skipped += skipped
        self._set_up(e, schema, mesh, *data)

    @classmethod
    def without_data(cls, experiment: Experiment, schema: Schema, mesh: Mesh) -> RewardTask:
        """The task on one made-up example: all that its step needs to be compiled (planning/compile.py)."""
        none = np.zeros((1, len(schema)), np.float32)
        branch = Branch(np.zeros(1, np.int32), none[0], none[0] > 0, example=0, at=1)
        data = RewardData((PromptGroup(np.zeros(1, np.int32), (branch,)),), none, none > 0, np.ones(1, int), ("",))
        task = cls.__new__(cls)
        task.skipped = []
        task._set_up(experiment, schema, mesh, data, data)
        return task

    def _set_up(self, e: Experiment, schema: Schema, mesh: Mesh, *data: RewardData) -> None:
        self.experiment, self.schema, self.mesh = e, schema, mesh
        self.frozen = e.optimizer.frozen_names
        self.weights = np.array([e.objective.attribute_weights.get(name, 1.0) for name in schema.names], np.float32)
        self.model = RewardModel(
            config=e.model, num_attributes=len(schema), readout=e.head.readout, use_bias=e.head.use_bias,
            compute=make_compute(e, mesh.devices.flat[0].platform), frozen=e.optimizer.frozen_layers,
        )  # fmt: skip
        self._set_data(*data)

    def _set_data(self, train: RewardData, validation: RewardData) -> None:
        batch = self.experiment.batch
        length, responses = batch.row_length, batch.responses_per_row or max(1, batch.row_length // 32)
        self.train, self.validation = train, validation
        self.plan = BatchPlan(train.groups, batch.rows, length, responses, self.experiment.train.seed)
        self.evaluation_rows = batch.evaluation_rows or batch.rows // batch.micro_batches
        self.validation_rows = pack(validation.groups, length, responses, range(len(validation.groups)))
        self.feed = make_feeder(train.groups, length, responses, batch.micro_batches, self.mesh)
        self.feed_validation = make_feeder(validation.groups, length, responses, 1, self.mesh)

    def on_cached_states(self, model: RewardModel, train, validation) -> RewardTask:
        """This task with other tokens (places in a table of states) and the model that takes them."""
        task = RewardTask.__new__(RewardTask)
        task.__dict__.update(self.__dict__)
        task.model = model
        task.frozen = (*self.experiment.optimizer.frozen, "llama/embedding")
        task._set_data(replace(self.train, groups=train), replace(self.validation, groups=validation))
        return task

    @property
    def loss(self):
        return make_loss(self.model, self.weights, self.experiment.objective.average)

    def begin(self, params, batch: Batch, new_head: bool):
        """A new head's first predictions lie near the mean ratings."""
        if not new_head:
            return params
        means = self.train.mean_ratings()
        if self.model.use_bias:
            return params | {"reward_head": params["reward_head"] * 0, "reward_bias": means}
        first = jax.tree.map(lambda x: x[0], batch)
        states = self.model.apply({"params": params}, reward_inputs(first), method=RewardModel.states)
        return params | {"reward_head": initial_head(states, first.examples >= 0, means)}

    def evaluation_step(self, params, batch: Batch):
        """Predictions [B, R, A]."""
        return self.model.apply({"params": params}, reward_inputs(jax.tree.map(lambda x: x[0], batch)))

    def evaluate(self, step, params) -> Evaluation:
        data = self.validation
        predicted = np.zeros_like(data.ratings)
        for rows in evaluation_steps(self.validation_rows, self.evaluation_rows):
            outputs = np.asarray(step(params, self.feed_validation(rows)))
            for row, output in zip(rows, outputs, strict=True):
                examples = row_examples(data.groups, row)
                predicted[examples] = output[: len(examples)]
        total, count = masked_squared_error(
            predicted, data.ratings, data.mask, self.weights, self.experiment.objective.average
        )
        result = evaluate_predictions(
            self.schema.names, predicted, data.ratings, data.mask, data.lengths, data.ids,
            self.train.ratings, self.train.mask, self.train.lengths,
        )  # fmt: skip
        values = {
            f"attributes/{name}/{metric}": value
            for name, metrics in result.metrics.items()
            for metric, value in metrics.items()
            if metric != "count"
        }
        return Evaluation(float(total / count), values, result)

    def log_values(self, metrics) -> dict[str, float]:
        return {f"attributes/{n}/mse": float(x) for n, x in zip(self.schema.names, metrics["mse"], strict=True)}

    def summary(self) -> dict[str, str]:
        packed = packing_statistics(self.train.groups, self.plan.epoch(0), self.experiment.batch.row_length)
        return {
            "training examples": f"{packed.examples} in {len(self.train.groups)} groups that share prompts",
            "validation examples": f"{len(self.validation.ratings)} in {len(self.validation.groups)} groups",
            "sharing prompts": f"{packed.saving:.2f} times as many tokens without it",
        }

    def head_outputs(self, tokens: int, examples: int) -> float:
        return len(self.schema) * examples / max(tokens, 1)

    def report(self, evaluation: Evaluation, folder: Path | None, records, summary, config_text: str) -> str:
        result: EvaluationResult = evaluation.detail
        if folder is not None:
            write_report(folder, result, records, summary, config_text)
        return format_table(result)
