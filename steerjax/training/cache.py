"""The frozen layers run once: their outputs over all data are kept in the host's memory and fed in place of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from steerjax.data.batch import Batch, Feeder, evaluation_steps
from steerjax.data.packing import Row
from steerjax.parallel.rules import replicated


class FrozenStates:
    """What the frozen layers give at every node of some trees: (tree, node) -> float32 [tokens, width]."""

    def __init__(self, width: int):
        self.width = width
        self._nodes: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, tree: int, node: int) -> np.ndarray:
        return self._nodes[tree, node]

    def fill(
        self, states: Callable, params: dict, feed: Feeder, rows: Sequence[Row], size: int,
        done: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Computes them with `frozen_states` over rows that hold all of the trees, `size` rows a step; `done` is called
        after each."""
        build = dataclasses.replace(feed.build, states=None)
        feed = dataclasses.replace(feed, build=build)
        for step in evaluation_steps(rows, size):
            outputs = np.asarray(states(params, feed(step)), np.float32)
            for row, output in zip(step, outputs, strict=True):
                for tree, node, place in build.layout(row).nodes:
                    self._nodes[tree, node] = output[place : place + len(build.trees[tree].pieces[node])].copy()
            done()


def frozen_states(module: nn.Module, frozen_layers: int, mesh: Mesh) -> Callable:
    """(whole parameters, batch [1, B, T]) -> outputs of the frozen layers [B, T, D], on every process."""

    def states(params: dict, batch: Batch):
        inputs = (x[0] for x in (batch.tokens, batch.positions, batch.until))
        return module.apply({"params": params}, *inputs, frozen_layers, method="frozen_states")

    return jax.jit(states, out_shardings=replicated(mesh))
