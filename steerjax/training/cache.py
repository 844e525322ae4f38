"""The frozen layers run once: their outputs over all data become the embedding table of a shorter model.

Every token of the data gets a place in a table [C, D] of states, and the groups' tokens are replaced by those places.
So the step, the feeder and the packing need not know that anything is cached.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from steerjax.data.batch import evaluation_steps, row_arrays
from steerjax.data.packing import PromptGroup, pack
from steerjax.models.reward_head import RewardModel
from steerjax.training.reward import RewardTask, reward_inputs


def numbered(groups: Sequence[PromptGroup], first: int) -> tuple[tuple[PromptGroup, ...], int]:
    """The groups with every token replaced by its own number, from `first`; and the number after the last."""
    out = []

    def take(tokens: np.ndarray) -> np.ndarray:
        nonlocal first
        first += len(tokens)
        return np.arange(first - len(tokens), first, dtype=np.int32)

    for group in groups:
        prompt = take(group.prompt)
        out.append(PromptGroup(prompt, tuple(dataclasses.replace(b, tokens=take(b.tokens)) for b in group.branches)))
    return tuple(out), first


class StateCache:
    """The frozen layers' outputs over a task's data.

    Attributes:
        task: the task on cached states.
    """

    def __init__(self, task: RewardTask):
        self._task = task
        self._train, size = numbered(task.train.groups, 0)
        self._validation, size = numbered(task.validation.groups, size)
        self._size = -(-size // 1024) * 1024  # so that a mesh can cut it
        model = dataclasses.replace(task.model, cached=self._size)
        self.task = task.on_cached_states(model, self._train, self._validation)

    def fill(self, params: dict, shardings: dict) -> dict:
        """Parameters of the model on cached states: the table for the embedding, no frozen layers."""
        self._frozen = {name: params["llama"][name] for name in ("embedding", "frozen_layers")}
        table = self._table(params)
        sharding = shardings["llama"]["embedding"]
        embedding = jax.make_array_from_callback(table.shape, sharding, lambda index: table[index])
        llama = {name: value for name, value in params["llama"].items() if name != "frozen_layers"}
        return params | {"llama": llama | {"embedding": embedding}}

    def whole(self, params: dict) -> dict:
        """The inverse of `fill`."""
        return params | {"llama": params["llama"] | self._frozen}

    def _table(self, params: dict) -> np.ndarray:
        """float32 [C, D]."""
        task, length = self._task, self._task.experiment.batch.row_length
        table = np.zeros((self._size, task.experiment.model.hidden_size), np.float32)

        def states(params, batch):
            inputs = reward_inputs(jax.tree.map(lambda x: x[0], batch))
            return task.model.apply({"params": params}, inputs, method=RewardModel.frozen_states)

        run = jax.jit(states, out_shardings=NamedSharding(task.mesh, PartitionSpec()))
        for groups, places in ((task.train.groups, self._train), (task.validation.groups, self._validation)):
            build = functools.partial(row_arrays, groups, row_length=length, responses_per_row=length)
            feed = dataclasses.replace(task.feed_validation, build=build)
            rows = pack(groups, length, length, range(len(groups)))
            for step in evaluation_steps(rows, task.evaluation_rows):
                outputs = np.asarray(run(params, feed(step)), np.float32)
                for row, output in zip(step, outputs, strict=True):
                    arrays = row_arrays(places, row, length, length)
                    real = arrays.segments > 0
                    table[arrays.tokens[real]] = output[real]
        return table
