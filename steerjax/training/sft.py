"""Attribute-conditioned SFT as a task: rated conversations in, cross-entropy over the responses."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from steerjax.chat.render import Renderer
from steerjax.config import Experiment
from steerjax.data.batch import BatchPlan, evaluation_steps
from steerjax.data.packing import pack
from steerjax.models.attention.mask import Layout
from steerjax.models.llama import CausalLM
from steerjax.objectives.sft import chunked_cross_entropy
from steerjax.report.plots import plot_losses
from steerjax.schema import Schema
from steerjax.training.input import Feeder, each_usable, load_splits
from steerjax.training.sft_data import SFTBatch, SFTExample, sft_example, sft_groups, sft_row_arrays
from steerjax.training.task import Evaluation, make_compute

BATCH_AXES = SFTBatch(*[(None, "batch", "length")] * len(SFTBatch._fields))


def dummy_inputs() -> tuple:
    """One token; enough to initialise a chat model."""
    one = np.zeros((1, 1), np.int32)
    return one, one, Layout(one, one)


def make_loss(model: CausalLM, chunk: int):
    """(params, batch) -> (sum, (count, {"accuracy": (correct tokens, tokens)})), all float32.

    Args:
        chunk: tokens of a row whose logits are held at a time.
    """

    def loss(params, batch: SFTBatch):
        bound = model.bind({"params": params})
        layout = Layout(batch.segments, batch.segments * 0)
        states = bound.states(batch.tokens, batch.positions, layout)
        total, count, correct = chunked_cross_entropy(states, bound.head, batch.targets, batch.weights, chunk)
        return total, (count, {"accuracy": (correct, count)})

    return loss


class SFTTask:
    """See `training.task.Task`."""

    kind = "chat"
    inputs = dummy_inputs()

    def __init__(self, experiment: Experiment, schema: Schema, renderer: Renderer, mesh: Mesh):
        e, batch = experiment, experiment.batch
        *splits, self.skipped = load_splits(e.data, schema)
        convert = functools.partial(
            sft_example, renderer=renderer, ratings=e.sft.ratings, missing=e.sft.missing, row_length=batch.row_length
        )
        examples = []
        for conversations in splits:
            usable, skipped = each_usable(conversations, convert, skip=e.data.on_bad_row == "skip")
            examples.append(usable)
            self.skipped += skipped
        self._set_up(e, schema, mesh, *examples)

    @classmethod
    def without_data(cls, experiment: Experiment, schema: Schema, mesh: Mesh) -> SFTTask:
        """The task on one made-up example: all that its step needs to be compiled (planning/compile.py)."""
        examples = [SFTExample(np.zeros(2, np.int32), np.ones(2, bool), "", "", 0)]
        task = cls.__new__(cls)
        task.skipped = []
        task._set_up(experiment, schema, mesh, examples, examples)
        return task

    def _set_up(self, e: Experiment, schema: Schema, mesh: Mesh, *examples: list[SFTExample]) -> None:
        batch = e.batch
        self.experiment, self.schema = e, schema
        self.train, self.validation = examples
        self.frozen = e.optimizer.frozen_names
        compute = make_compute(e, mesh.devices.flat[0].platform)
        self.model = CausalLM(config=e.model, compute=compute, frozen=e.optimizer.frozen_layers)
        most = batch.responses_per_row or batch.row_length
        self.plan = BatchPlan(sft_groups(self.train), batch.rows, batch.row_length, most, e.train.seed)
        self.evaluation_rows = batch.evaluation_rows or batch.rows // batch.micro_batches
        groups = sft_groups(self.validation)
        self.validation_rows = pack(groups, batch.row_length, most, range(len(groups)))

        def feeder(examples, micro_batches: int) -> Feeder:
            build = functools.partial(sft_row_arrays, examples, row_length=batch.row_length)
            return Feeder(build, BATCH_AXES, micro_batches, mesh)

        self.feed = feeder(self.train, batch.micro_batches)
        self.feed_validation = feeder(self.validation, 1)

    @property
    def loss(self):
        return make_loss(self.model, self.experiment.compute.loss_chunk)

    def begin(self, params, batch, new_head: bool):
        return params

    def evaluation_step(self, params, batch: SFTBatch):
        """Sums of loss, tokens and right tokens."""
        total, (count, sums) = self.loss(params, jax.tree.map(lambda x: x[0], batch))
        return total, count, sums["accuracy"][0]

    def evaluate(self, step, params) -> Evaluation:
        sums = np.zeros(3)
        for rows in evaluation_steps(self.validation_rows, self.evaluation_rows):
            sums += np.array([float(x) for x in step(params, self.feed_validation(rows))])
        loss, accuracy = sums[0] / sums[1], sums[2] / sums[1]
        return Evaluation(loss, {"accuracy": accuracy, "tokens": sums[1]}, None)

    def log_values(self, metrics) -> dict[str, float]:
        return {"accuracy": float(metrics["accuracy"])}

    def summary(self) -> dict[str, str]:
        train, validation = (sum(int(x.trained.sum()) for x in split) for split in (self.train, self.validation))
        return {
            "training": f"{len(self.train)} conversations, {train:,} trained tokens",
            "validation": f"{len(self.validation)} conversations, {validation:,} trained tokens",
        }

    def head_outputs(self, tokens: int, examples: int) -> float:
        return self.model.config.vocab_size

    def report(self, evaluation: Evaluation, folder: Path | None, records, summary, config_text: str) -> str:
        values = {"loss (nats a token)": evaluation.loss, "perplexity": float(np.exp(evaluation.loss)),
                  "accuracy of the next token": evaluation.values["accuracy"]}  # fmt: skip
        table = "\n".join(f"{name:>28}  {value:.4f}" for name, value in values.items())
        text = f"validation, {int(evaluation.values['tokens']):,} response tokens\n{table}"
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            plot_losses(records, folder / "loss.png")
            facts = "\n".join(f"{name:>28}  {value}" for name, value in summary.items())
            page = f"# SFT\n\n```\n{facts}\n\n{text}\n```\n\n![loss](loss.png)\n\n```json\n{config_text}```\n"
            (folder / "report.md").write_text(page, encoding="utf-8")
        return text
