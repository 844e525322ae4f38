"""Examples -> trees: what several examples begin with is written once, and their loss stays what it was.

Two examples share a place if all tokens up to it are equal and the place has no two targets; the token before targets
that differ is written once a branch. So a causal model computes at every place what it would in a row of the example's
own. (Tree training, arXiv 2511.00413.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of tokens, and what is to be learnt at some of its places."""

    objective: str
    number: int  # in the objective's data, from 0
    tokens: np.ndarray  # int32 [P]
    root: int  # how many first tokens examples of its tree share with it
    places: np.ndarray  # int32 [n], ascending: where something is learnt
    targets: np.ndarray  # int32 [n], what; an objective knows what its numbers mean
    weights: np.ndarray  # float32 [n]; those of places that examples share add up
    unit: Hashable = None  # examples of one unit stay in one row; None is a unit of its own

    def between(self, start: int, stop: int) -> slice:
        """The part of `places` that lies in [start, stop)."""
        return slice(*np.searchsorted(self.places, (start, stop)))


@dataclass(frozen=True, eq=False)
class Tree:
    """Examples that share their beginnings, in the order of the data."""

    examples: tuple[Example, ...]
    pieces: tuple[np.ndarray, ...]  # tokens of each node, int32; a parent stands before its children
    parents: tuple[int, ...]  # number of each node's parent; -1 for a first one
    paths: tuple[tuple[int, ...], ...]  # of each example, its nodes from the first on; it ends where the last ends
    units: tuple[tuple[int, ...], ...]  # numbers of examples that stay together

    @property
    def length(self) -> int:
        """Tokens, each written once."""
        return sum(map(len, self.pieces))


def grow(examples: Sequence[Example]) -> tuple[Tree, ...]:
    """Trees of examples whose first `root` tokens are equal, in the order of their first examples."""
    groups: dict[bytes, list[Example]] = {}
    units: dict[Hashable, bytes] = {}
    for example in examples:
        key = example.tokens[: example.root].astype(np.int32).tobytes()
        if example.unit is not None:  # its members stand in one tree, whatever they share
            key = units.setdefault((example.objective, example.unit), key)
        groups.setdefault(key, []).append(example)
    return tuple(_tree(group) for group in groups.values())


@dataclass(eq=False)
class _Node:
    """A piece of the trie while it grows; `targets` are those of each of its places, by objective, -1 for none."""

    piece: np.ndarray
    parent: _Node | None = None
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    children: dict[int, list[_Node]] = field(default_factory=dict)  # by their first token

    def shared(self, example: Example, start: int) -> int:
        """How many of this node's places the example's from `start` on can be."""
        size = min(len(self.piece), len(example.tokens) - start)
        differ = self.piece[:size] != example.tokens[start : start + size]
        if example.objective in self.targets:
            part = example.between(start, start + size)
            places = example.places[part] - start
            here = self.targets[example.objective][places]
            differ[places] |= (here >= 0) & (here != example.targets[part])
        return int(differ.argmax()) if differ.any() else size

    def learn(self, example: Example, start: int) -> None:
        """Takes the targets of an example whose place `start` is this node's first."""
        part = example.between(start, start + len(self.piece))
        if part.start < part.stop:
            here = self.targets.setdefault(example.objective, np.full(len(self.piece), -1, np.int32))
            here[example.places[part] - start] = example.targets[part]

    def split(self, size: int) -> _Node:
        """Hands the first `size` tokens to a new parent, so that what ended with this node still does."""
        upper = _Node(self.piece[:size], self.parent, {name: x[:size] for name, x in self.targets.items()})
        siblings = self.parent.children[int(self.piece[0])]
        siblings[siblings.index(self)] = upper
        self.piece, self.parent = self.piece[size:], upper
        self.targets = {name: x[size:] for name, x in self.targets.items()}
        upper.children[int(self.piece[0])] = [self]
        return upper


def _insert(root: _Node, example: Example) -> _Node:
    """The node that the example ends with."""
    node, start = root, 0
    while start < len(example.tokens):
        known = node.children.setdefault(int(example.tokens[start]), [])
        size, child = max(((c.shared(example, start), c) for c in known), key=lambda pair: pair[0], default=(0, None))
        if not size:
            child = _Node(example.tokens[start:], node)
            known.append(child)
        elif size < len(child.piece):
            child = child.split(size)
        child.learn(example, start)
        node, start = child, start + len(child.piece)
    return node


def _tree(examples: list[Example]) -> Tree:
    root = _Node(np.zeros(0, np.int32))
    ends = [_insert(root, example) for example in examples]
    nodes, numbers = [root], {root: -1}
    for node in nodes:  # which grows: a parent stands before its children
        for child in (child for children in node.children.values() for child in children):
            numbers[child] = len(numbers) - 1
            nodes.append(child)
    paths = {root: ()}
    for node in nodes[1:]:
        paths[node] = (*paths[node.parent], numbers[node])
    units: dict[Hashable, list[int]] = {}
    for i, example in enumerate(examples):
        units.setdefault(i if example.unit is None else (example.objective, example.unit), []).append(i)
    pieces, parents = zip(*((node.piece, numbers[node.parent]) for node in nodes[1:]), strict=True)
    return Tree(tuple(examples), pieces, parents, tuple(paths[end] for end in ends), tuple(map(tuple, units.values())))
