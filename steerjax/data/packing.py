"""Trees -> packed rows, drawn anew each epoch; and what a row's tokens see.

A row is a sequence of trees, each laid out depth first, so that all that sees a token stands right behind it, up to
the place `until` of the token. A tree too large for a row is cut between units, and the path from the root is written
again.
"""

import bisect
import heapq
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from steerjax.data.trees import Example, Tree
from steerjax.errors import DataError

_OPEN = 16  # rows that a large tree's units are offered to


class Part(NamedTuple):
    """What of a tree (its number) stands together in a row."""

    tree: int
    examples: tuple[int, ...]  # their numbers, in the order in which their branches are written
    length: int  # tokens
    pairs: int  # (query, key) pairs that the mask allows; what attention costs


Row = tuple[Part, ...]


def check_fits(tokens: int, row_length: int) -> None:
    """Raises DataError: an example is too long for a row of its own. (No example is ever cut.)"""
    if tokens > row_length:
        cure = "raise config.batch.row_length, or set config.data.on_bad_row='skip' to leave such rows out"
        raise DataError(f"{tokens} tokens do not fit a row of {row_length}", cure=cure)


def parts_of(number: int, tree: Tree, row_length: int, random: np.random.Generator | None) -> list[Part]:
    """The tree in as few parts as fit a row each; its units in random order, or as they are, each where it adds the
    fewest tokens.

    Raises DataError: a unit that no row can hold.
    """
    order = range(len(tree.units)) if random is None else random.permutation(len(tree.units))
    units = [tree.units[i] for i in order]
    if tree.length <= row_length:
        return [_part(number, tree, itertools.chain(*units), range(len(tree.pieces)))]
    # A unit comes right behind the largest one that has an example ending where one of its own ends.
    first: dict[int, int] = {}
    for place, unit in sorted(enumerate(units), key=lambda one: -len(one[1])):
        for e in unit:
            first.setdefault(tree.paths[e][-1], place)
    units.sort(key=lambda unit: (min(first[tree.paths[e][-1]] for e in unit), -len(unit)))
    done: list[tuple[int, tuple[int, ...], set[int]]] = []  # (tokens, examples, nodes)
    filling: list[tuple[int, tuple[int, ...], set[int]]] = []  # rows still open
    for unit in units:
        nodes = {node for e in unit for node in tree.paths[e]}
        added = [sum(len(tree.pieces[node]) for node in nodes - known) for *_, known in filling]
        fitting = [i for i, new in enumerate(added) if filling[i][0] + new <= row_length]
        if fitting:
            used, examples, known = filling[i := min(fitting, key=added.__getitem__)]
            filling[i] = (used + added[i], examples + unit, known | nodes)
        else:
            length = sum(len(tree.pieces[node]) for node in nodes)
            check_fits(length, row_length)
            filling.append((length, unit, nodes))
            if len(filling) > _OPEN:
                done.append(filling.pop(max(range(len(filling)), key=lambda i: filling[i][0])))
    return [_part(number, tree, examples, nodes) for _, examples, nodes in done + filling]


def _part(number: int, tree: Tree, examples: Iterable[int], nodes: Collection[int]) -> Part:
    depths = {-1: 0}  # tokens through the end of a node
    length = pairs = 0
    for node in sorted(nodes):
        before, size = depths[tree.parents[node]], len(tree.pieces[node])
        depths[node] = before + size
        length += size
        pairs += size * before + size * (size + 1) // 2
    return Part(number, tuple(examples), length, pairs)


def fill(parts: Sequence[Part], row_length: int, random: np.random.Generator | None = None) -> list[Row]:
    """Parts in few rows: best fit, the longer first, each into the fullest row that still has room.

    With `random` a part counts as a random share of its length where the longer is first, so that lengths in a row vary
    about as in a random draw and other parts meet in other epochs; a row's parts are shuffled.
    """
    lengths = np.array([part.length for part in parts], np.float64)
    if random is not None:
        lengths *= random.random(len(parts))
    rows: list[list[Part]] = []
    rooms: list[int] = []  # tokens that open rows have left, sorted, each number once
    having: dict[int, list[int]] = {}  # heaps of the rows that have so much left
    for i in np.argsort(-lengths, kind="stable"):
        size = parts[i].length
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            left = rooms[place]
            row = heapq.heappop(having[left])
            if not having[left]:
                del rooms[place]
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(parts[i])
        left -= size
        heap = having.setdefault(left, [])
        if not heap:
            bisect.insort(rooms, left)
        heapq.heappush(heap, row)
    if random is not None:
        rows = [[row[i] for i in random.permutation(len(row))] for row in rows]
    return [tuple(row) for row in rows]


def pack(trees: Sequence[Tree], row_length: int, random: np.random.Generator | None = None) -> list[Row]:
    """Every example of the trees once, in rows of at most `row_length` tokens. Raises DataError as `parts_of`."""
    parts = [part for number, tree in enumerate(trees) for part in parts_of(number, tree, row_length, random)]
    return fill(parts, row_length, random)


def epoch_rows(trees: Sequence[Tree], row_length: int, seed: int, epoch: int) -> list[Row]:
    """The rows of an epoch in the order in which they are trained; a pure function of the arguments."""
    random = np.random.default_rng((seed, epoch))
    rows = pack(trees, row_length, random)
    return [rows[i] for i in random.permutation(len(rows))]


def unshared_rows(trees: Sequence[Tree]) -> list[Row]:
    """One row for each example, in order: what packing must equal."""
    return [(_part(n, tree, (e,), path),) for n, tree in enumerate(trees) for e, path in enumerate(tree.paths)]


class Layout(NamedTuple):
    """A row as arrays of T tokens."""

    tokens: np.ndarray  # int32 [T], 0 in the padding
    positions: np.ndarray  # int32 [T], of each token in its own text, from 0
    until: np.ndarray  # int32 [T]; a token of the padding sees itself
    targets: dict[str, np.ndarray]  # by objective, int32 [T], -1 where nothing is learnt
    weights: dict[str, np.ndarray]  # by objective, float32 [T]
    ends: list[tuple[Example, int]]  # each example and the place of its last token
    nodes: list[tuple[int, int, int]]  # (tree, node, place) of each piece that is written


def lay_out(trees: Sequence[Tree], row: Row, row_length: int, objectives: Sequence[str]) -> Layout:
    """Writes a row's trees depth first, with the targets of these objectives."""
    tokens, positions = np.zeros((2, row_length), np.int32)
    targets = {name: np.full(row_length, -1, np.int32) for name in objectives}
    weights = {name: np.zeros(row_length, np.float32) for name in objectives}
    out = Layout(tokens, positions, np.arange(1, row_length + 1, dtype=np.int32), targets, weights, [], [])
    start = 0
    for part in row:
        tree = trees[part.tree]
        places = _write(tree, part, start, out)
        out.nodes.extend((part.tree, node, place) for node, place in places.items())
        for e in part.examples:
            _learn(tree.examples[e], [(places[node], len(tree.pieces[node])) for node in tree.paths[e]], out)
        start += part.length
    return out


def _write(tree: Tree, part: Part, start: int, out: Layout) -> dict[int, int]:
    """Tokens, positions and until of a part from `start` on; where each of its nodes begins."""
    children: dict[int, dict[int, None]] = {}  # of each node, in the order of the examples
    for e in part.examples:
        for node in tree.paths[e]:
            children.setdefault(tree.parents[node], {})[node] = None
    places: dict[int, int] = {}
    stack = [(node, 0) for node in reversed(children[-1])]
    while stack:
        node, depth = stack.pop()
        size = len(tree.pieces[node])
        out.tokens[start : start + size] = tree.pieces[node]
        out.positions[start : start + size] = np.arange(depth, depth + size)
        places[node] = start
        start += size
        stack += [(child, depth + size) for child in reversed(children.get(node, {}))]
    ends: dict[int, int] = {}
    for node, place in reversed(places.items()):  # children stand behind their parents
        stop = place + len(tree.pieces[node])
        ends[node] = max([stop, *(ends[child] for child in children.get(node, {}))])
        out.until[place:stop] = ends[node]
    return places


def _learn(example: Example, path: list[tuple[int, int]], out: Layout) -> None:
    """Targets and weights of an example whose nodes lie at these (place, size)."""
    start = 0
    for place, size in path:
        part = example.between(start, start + size)
        if part.start < part.stop and example.objective in out.targets:
            where = example.places[part] + (place - start)
            out.targets[example.objective][where] = example.targets[part]
            out.weights[example.objective][where] += example.weights[part]
        start += size
    out.ends.append((example, place + size - 1))


class PackingStatistics(NamedTuple):
    """Counts over rows."""

    rows: int
    row_length: int
    examples: int
    tokens: int
    unshared_tokens: int  # with every example written whole
    pairs: int  # (query, key)

    @property
    def fill(self) -> float:
        return self.tokens / (self.rows * self.row_length)

    @property
    def saving(self) -> float:
        """How many times fewer tokens than with every example written whole."""
        return self.unshared_tokens / self.tokens


def packing_statistics(trees: Sequence[Tree], rows: Sequence[Row], row_length: int) -> PackingStatistics:
    parts = list(itertools.chain(*rows))
    examples = [trees[part.tree].examples[e] for part in parts for e in part.examples]
    tokens, pairs = sum(part.length for part in parts), sum(part.pairs for part in parts)
    unshared = sum(len(example.tokens) for example in examples)
    return PackingStatistics(len(rows), row_length, len(examples), tokens, unshared, pairs)
