"""What `train` makes of an experiment before its first step, for benchmarks that time or count the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from steerjax.bundle.build import random_parameters
from steerjax.chat.render import Renderer
from steerjax.config import default_config, resolve
from steerjax.data.batch import Batch
from steerjax.data.packing import Row
from steerjax.data.trees import Tree
from steerjax.hf.description import Description
from steerjax.objectives import Objective
from steerjax.parallel.mesh import make_mesh
from steerjax.schema import Schema
from steerjax.training.config import Experiment
from steerjax.training.input import Input, make_feeder, make_input
from steerjax.training.program import Program, make_objectives
from steerjax.training.source import initial_parameters, resolve_model
from steerjax.training.state import make_state


@dataclass(frozen=True)
class Task:
    """An experiment, without its data."""

    experiment: Experiment
    source: Description | None
    schema: Schema
    renderer: Renderer
    objectives: list[Objective]

    def input(self) -> Input:
        """What the config's data are."""
        return make_input(self.experiment, self.objectives, self.renderer)


def make_task(objectives: Sequence[str] = ("regression",), **groups: dict[str, Any]) -> Task:
    """Of a recipe: the defaults with the changes of each group."""
    config = default_config()
    config.objectives = tuple(objectives)
    for group, changes in groups.items():
        config[group].update(changes)
    e, source, renderer = resolve_model(resolve(config.to_dict()))
    schema = renderer.schema
    return Task(e, source, schema, renderer, make_objectives(e, schema, renderer))


class Steps:
    """A train state, and the step of `train` over rows of these trees.

    Attributes:
        feed: makes a batch of rows. `program` is the compiled step and what it knows; `mesh` its devices.
    """

    def __init__(self, task: Task, trees: Sequence[Tree], steps: int = 10**6):
        e = task.experiment
        self.mesh, self._trees = make_mesh(e.mesh), trees
        self.feed = make_feeder(trees, task.objectives, e.batch.row_length, self.mesh, e.batch.micro_batches)
        with jax.set_mesh(self.mesh):
            self.program = program = Program(e, task.schema, task.objectives, self.mesh, self.feed, steps)
            if task.source is None:  # adapters, too, which `train` refuses
                params = random_parameters(program.module, program.whole, e.train.seed)
            else:
                params, _ = initial_parameters(task.source, program.module, program.whole, task.schema.names, 0)
            self._state = make_state(params, program.abstract, program.optimizer, e.optimizer)

    def dispatch(self, batch: Batch) -> dict[str, jax.Array]:
        """The metrics of a step that may not have ended yet."""
        with jax.set_mesh(self.mesh):
            self._state, metrics = self.program.train_step(self._state, batch)
        return metrics

    def __call__(self, rows: Sequence[Row]) -> dict[str, float]:
        """Feeds rows, and waits for the step: its loss, and what it computed."""
        loss = float(self.dispatch(self.feed(rows))["loss"])
        return {"loss": loss, **self.facts(rows)}

    def facts(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Program.step_facts`."""
        return self.program.step_facts(rows, self._trees)

    def compile(self, batch: Batch):
        """The step as it is compiled for a batch; from here on it is what runs."""
        with jax.set_mesh(self.mesh):
            compiled = self.program.train_step.lower(self._state, batch).compile()
        self.program.train_step = compiled
        return compiled
