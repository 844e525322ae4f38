"""A run's model and its compiled steps, from shapes alone: what `train` runs and `plan` compiles for other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from steerjax.bundle.build import abstract_parameters, build_module, resolve_compute
from steerjax.data.batch import Batch, Feeder
from steerjax.data.packing import Row, packing_statistics
from steerjax.models.flops import training_flops
from steerjax.objectives import Objective, Setting, find_objective
from steerjax.parallel.mesh import make_any
from steerjax.parallel.rules import replicated, shardings_of
from steerjax.schema import Schema
from steerjax.training.config import Experiment
from steerjax.training.optimizer import join, make_optimizer
from steerjax.training.schedules import make_schedule
from steerjax.training.source import with_base_dtype
from steerjax.training.state import abstract_state
from steerjax.training.step import forward, make_train_step, over_micro_batches


def make_objectives(experiment: Experiment, schema: Schema, renderer) -> list[Objective]:
    """The experiment's objectives, in order."""
    e = experiment
    setting = Setting(schema, renderer, e.compute.loss_chunk, e.batch.row_length, e.model.max_position_embeddings)
    return [find_objective(name)(config, setting) for name, config in e.objective.items()]


class Program:
    """What stays the same while a run goes on.

    Attributes:
        module: of the model. `attention` is the back end, and why it is that one.
        whole: abstract parameters as checkpoints hold them.
        abstract: the abstract train state.
        train_step: (state, batch [M, B/M, ...]) -> (state, metrics), jitted.
        any_process: true on this process -> true on any (`mesh.make_any`).
        evaluation_step: (trained, frozen, batch [1, B, ...]) -> outputs of each objective, jitted.
    """

    def __init__(
        self,
        experiment: Experiment,
        schema: Schema,
        objectives: Sequence[Objective],
        mesh: Mesh,
        feed: Feeder,
        steps: int,
    ):
        e, self.objectives, self.mesh = experiment, list(objectives), mesh
        compute, self.attention = resolve_compute(e.compute, e.model, e.batch.row_length, mesh)
        self.kind = objectives[0].kind
        self.module = build_module(self.kind, e.model.architecture(), compute, len(schema), e.head)
        self.optimizer = make_optimizer(e.optimizer)
        self.whole = with_base_dtype(abstract_parameters(self.module, mesh), e.model.lora)
        self.abstract = abstract_state(self.whole, self.optimizer, e.optimizer, mesh)
        self._frozen, self._model = e.optimizer.frozen_layers, e.model
        self._cached, self._row_length = e.compute.cache_frozen, e.batch.row_length
        params = self.abstract.params
        head = params.get("reward_head", params.get("lm_head", params["llama"]["embedding"]))
        self._head_trained = head is not None
        self._outputs = e.model.vocab_size if self.kind == "chat" else len(schema)
        states, everywhere = shardings_of(self.abstract), replicated(mesh)
        schedule = make_schedule(e.optimizer, steps)
        self.any_process = make_any(mesh)
        self.train_step = jax.jit(
            make_train_step(self.module, objectives, self.optimizer, schedule, self._frozen, e.train.seed),
            in_shardings=(states, feed.shardings),
            out_shardings=(states, everywhere),
            donate_argnums=0,
        )
        self.evaluation_step = jax.jit(
            self._evaluate, in_shardings=(states.params, states.frozen, feed.shardings), out_shardings=everywhere
        )

    def _evaluate(self, trained: dict, frozen: dict, batch: Batch) -> dict[str, Any]:
        batch = jax.tree.map(lambda x: x[0], batch)
        model, hidden = forward(self.module, join(trained, frozen), batch, self._frozen)
        return {o.name: o.outputs(model, hidden, batch, batch.targets[o.name]) for o in self.objectives}

    def with_new_heads(self, params: dict, batch: Batch) -> dict:
        """The parameters with the first values of new heads, from all rows of the first step at once."""

        def sums(params: dict, part: Batch) -> Mapping[str, Any]:
            model, hidden = forward(self.module, params, part, self._frozen)
            found = {o.name: o.first_sums(model, hidden, part, part.targets[o.name]) for o in self.objectives}
            return {name: value for name, value in found.items() if value is not None}

        def heads(params: dict, batch: Batch) -> dict:
            found = over_micro_batches(lambda part: sums(params, part), batch)
            new = [o.first_parameters(params, found[o.name]) for o in self.objectives if o.name in found]
            return {name: value for one in new for name, value in one.items()}

        shardings = {name: self.whole[name].sharding for name in jax.eval_shape(heads, params, batch)}
        return params | jax.jit(heads, out_shardings=shardings)(params, batch)

    def step_facts(self, rows: Sequence[Row], trees) -> dict[str, float]:
        """Of a step's rows: examples, tokens, the tokens that they stand for, and model FLOPs."""
        packed = packing_statistics(trees, rows, self._row_length)
        learnt = sum(len(trees[part.tree].examples[i].places) for row in rows for part in row for i in part.examples)
        return {
            "examples": packed.examples,
            "tokens": packed.tokens,
            "unshared_tokens": packed.unshared_tokens,
            "flops": self.flops(packed.tokens, packed.pairs, min(learnt, packed.tokens)),
        }

    def flops(self, tokens: int, pairs: int, learnt: int) -> float:
        """Model FLOPs of a step; the head is read at so many tokens."""
        head = self._outputs * learnt / max(tokens, 1)
        return training_flops(self._model, tokens, pairs, head, self._frozen, self._cached, self._head_trained)
