"""The rows of step s as a pure function of (trees, seed, s), and how they get to the devices."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from steerjax.data.packing import Layout, Row, epoch_rows, lay_out
from steerjax.data.trees import Tree


class Batch(NamedTuple):
    """Packed rows as arrays: B rows, T tokens; a step's have [M, B/M] in front in place of B."""

    tokens: np.ndarray  # int32 [B, T], 0 in the padding
    positions: np.ndarray  # int32 [B, T], of each token in its own text, from 0
    until: np.ndarray  # int32 [B, T], the first place in the row where a token is no longer seen
    targets: Mapping[str, Mapping[str, np.ndarray]]  # what each objective has put there (`Objective.arrays`)
    noise: jax.Array | None = None  # keys [B], where the step has dropout
    states: np.ndarray | None = None  # float32 [B, T, D], outputs of the frozen layers where they are kept


@dataclass(frozen=True, eq=False)
class RowBuilder:
    """Rows of trees as arrays."""

    trees: Sequence[Tree]
    row_length: int
    arrays: Mapping[str, Callable[[Layout], Mapping[str, np.ndarray]]]  # of each objective
    states: Callable[[int, int], np.ndarray] | None = None  # a `FrozenStates`: (tree, node) -> [tokens, width]

    def layout(self, row: Row) -> Layout:
        return lay_out(self.trees, row, self.row_length, tuple(self.arrays))

    def __call__(self, row: Row) -> Batch:
        """The arrays of one row, without B; of an empty row, padding."""
        layout, states = self.layout(row), None
        if self.states is not None:
            states = np.zeros((self.row_length, self.states.width), np.float32)
            for tree, node, place in layout.nodes:
                piece = self.states(tree, node)
                states[place : place + len(piece)] = piece
        targets = {name: arrays(layout) for name, arrays in self.arrays.items()}
        return Batch(layout.tokens, layout.positions, layout.until, targets, states=states)


@dataclass(frozen=True, eq=False)
class Feeder:
    """Puts packed rows on the mesh. Each process builds only the rows that its devices hold."""

    build: RowBuilder
    spec: Callable[[tuple[str | None, ...]], object]  # logical axes -> a sharding (`parallel.rules`)
    micro_batches: int = 1

    @functools.cached_property
    def _empty(self) -> Batch:
        return self.build(())

    @functools.cached_property
    def shardings(self) -> Batch:
        """How the arrays of a batch [M, B/M, ...] lie on the mesh: what has T entries a row is cut along them too."""

        def one(array: np.ndarray):
            along = ["length" if i == 0 and n == self.build.row_length else None for i, n in enumerate(array.shape)]
            return self.spec((None, "batch", *along))

        return jax.tree.map(one, self._empty)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Rows -> a batch of sharded arrays [M, B/M, ...]."""
        numbers = np.arange(len(rows)).reshape(self.micro_batches, -1)
        built = functools.cache(lambda row: jax.tree.leaves(self.build(rows[row])))
        leaf = itertools.count()

        def array(abstract: jax.ShapeDtypeStruct):
            number = next(leaf)

            def shard(index):
                parts = np.stack([built(int(row))[number][index[2:]] for row in numbers[index[:2]].flat])
                return parts.reshape(*numbers[index[:2]].shape, *parts.shape[1:])

            return jax.make_array_from_callback(abstract.shape, abstract.sharding, shard)

        return jax.tree.map(array, self.abstract(len(rows)))

    def abstract(self, rows: int) -> Batch:
        """Shapes, dtypes and shardings of a batch of so many rows."""

        def one(x: np.ndarray, sharding):
            shape = (self.micro_batches, rows // self.micro_batches, *x.shape)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, self._empty, self.shardings)


@dataclass(frozen=True, eq=False)  # eq=False: a plan is hashed by identity, arrays have no hash
class BatchPlan:
    """Which rows a step trains. Epochs follow each other without a gap, also within a step, so that every example is
    trained once an epoch and none is dropped."""

    trees: tuple[Tree, ...]
    rows: int
    row_length: int
    seed: int
    _last: list[int] = field(default_factory=lambda: [0, 0], init=False)  # the epoch asked for, and the rows before it

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as its run
    def epoch(self, epoch: int) -> list[Row]:
        """The rows of an epoch, in order."""
        return epoch_rows(self.trees, self.row_length, self.seed, epoch)

    def step_rows(self, step: int) -> list[Row]:
        """The rows of a step."""
        first = step * self.rows
        epoch, start = self._last if self._last[1] <= first else (0, 0)  # epochs may differ by a row or two
        while start + len(self.epoch(epoch)) <= first:
            epoch, start = epoch + 1, start + len(self.epoch(epoch))
        self._last[:] = epoch, start
        first -= start
        rows: list[Row] = []
        while len(rows) < self.rows:
            rows += self.epoch(epoch)[first : first + self.rows - len(rows)]
            first, epoch = 0, epoch + 1
        return rows

    def steps(self, epochs: float) -> int:
        """Steps until so many epochs of rows have been seen."""
        whole = sum(len(self.epoch(epoch)) for epoch in range(int(epochs)))
        part = (epochs % 1) * len(self.epoch(int(epochs))) if epochs % 1 else 0
        return max(1, math.ceil((whole + part) / self.rows))


def evaluation_steps(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows in steps of `size`; the last is filled up with padding rows, so that one shape is compiled."""
    return [[*rows[i : i + size], *[()] * (size - len(rows[i : i + size]))] for i in range(0, len(rows), size)]
