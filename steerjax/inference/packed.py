"""A model over trees in packed rows: what texts share is computed once, and few shapes are compiled.

What is computed follows from the trees alone: on one machine it gives the same bits again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from steerjax.bundle import Bundle
from steerjax.data.batch import Batch, Feeder, RowBuilder, evaluation_steps
from steerjax.data.packing import Layout, Row, fill, parts_of
from steerjax.data.trees import Tree
from steerjax.errors import ConfigError
from steerjax.parallel.rules import mesh_ways, on_mesh, replicated

_SHORTEST_ROW = 1024  # tokens; shorter texts share a row of this length
_LONGEST_ROW = 4096  # tokens, unless the user says otherwise


@dataclass
class Counts:
    """What was computed so far: examples, tokens, their places (padding too), compiled shapes."""

    examples: int = 0
    tokens: int = 0
    places: int = 0
    shapes: set[tuple[int, int]] = field(default_factory=set)  # (rows, row length)

    def __str__(self) -> str:
        filled = self.tokens / max(1, self.places)
        shapes = ", ".join(f"{rows} x {length}" for rows, length in sorted(self.shapes)) or "nothing"
        return f"{self.examples} responses, {self.tokens:,} tokens, rows {filled:.1%} filled, compiled for {shapes}"


def row_lengths(longest: int) -> tuple[int, ...]:
    """Lengths of packed rows, ascending: powers of two from 1024 tokens, and the longest."""
    doubled = (_SHORTEST_ROW << n for n in range(longest.bit_length()))
    return (*(length for length in doubled if length < longest), longest)


def bucketed_rows(trees: Sequence[Tree], lengths: Sequence[int]) -> dict[int, list[Row]]:
    """Each part of the trees in a row of the shortest of these ascending lengths, or in what a longer has left."""
    parts = [part for number, tree in enumerate(trees) for part in parts_of(number, tree, lengths[-1], None)]
    rows: dict[int, list[Row]] = {}
    for shorter, length in reversed(list(zip((0, *lengths), lengths, strict=False))):
        packed = fill(parts, length)
        needed = [row for row in packed if row[0].length > shorter]  # the longest part stands first
        parts = [part for row in packed if row[0].length <= shorter for part in row]
        if needed:
            rows[length] = needed
    return rows


class PackedModel:
    """`function(params, batch)`, outputs [B, T, ...] of a batch of B rows, over any number of trees.

    `row_length` 0 is the model's context, at most 4096 tokens; `rows`, those of a step, 0: 8 for each part of the mesh
    that rows are cut into, on a CPU 1. `longest`: tokens of the longest text that rows and model can hold.
    Raises ConfigError: rows that the mesh does not divide, a bad row length.
    """

    def __init__(self, bundle: Bundle, function: Callable[[dict, Batch], Any], *, row_length: int = 0, rows: int = 0):
        positions = bundle.description.model.max_position_embeddings
        self.row_length = row_length or min(positions, _LONGEST_ROW)
        self.longest = min(self.row_length, positions)
        ways = mesh_ways(bundle.mesh, ("data", "fsdp"))
        self.rows = rows or ways * (1 if jax.default_backend() == "cpu" else 8)
        if self.rows < 1 or self.rows % ways or self.row_length < 1:
            problem = f"{self.rows} rows of {self.row_length} tokens a step"
            raise ConfigError(f"{problem}; cure: at least 1 token, and a multiple of {ways} rows (mesh data x fsdp)")
        self.counts, self._bundle = Counts(), bundle
        everywhere = replicated(bundle.mesh)
        self._function = jax.jit(lambda params, batch: function(params, _rows_of(batch)), out_shardings=everywhere)

    def pack(self, trees: Sequence[Tree]) -> dict[int, list[Row]]:
        """Rows of the trees, by their length; needs no device."""
        return bucketed_rows(trees, row_lengths(self.row_length))

    def run(
        self, trees: Sequence[Tree], rows: Mapping[int, Sequence[Row]],
        arrays: Mapping[str, Callable[[Layout], Mapping[str, np.ndarray]]] | None = None,
    ) -> Iterator[tuple[Layout, Any]]:  # fmt: skip
        """Each row's layout and its outputs [T, ...]; `arrays` are `RowBuilder`'s."""
        mesh, running = self._bundle.mesh, []
        with jax.set_mesh(mesh):
            for length, packed in rows.items():
                build = RowBuilder(trees, length, arrays or {})
                feed = Feeder(build, on_mesh(mesh))
                for step in evaluation_steps(packed, self.rows):
                    running.append((build, step, self._function(self._bundle.params, feed(step))))  # not waited for
                    self.counts.places += length * self.rows
                self.counts.tokens += sum(part.length for row in packed for part in row)
                self.counts.shapes.add((self.rows, length))
        self.counts.examples += sum(len(tree.examples) for tree in trees)
        for build, step, outputs in running:
            outputs = jax.tree.map(np.asarray, outputs)
            for number, row in enumerate(step):
                yield build.layout(row), jax.tree.map(lambda x, n=number: x[n], outputs)


def _rows_of(batch: Batch) -> Batch:
    """The one micro-batch of a step."""
    return jax.tree.map(lambda x: x[0], batch)
