"""Packed rows: every example once and whole, within bounds, another order each epoch, a pure function of arguments."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerjax.data.batch import BatchPlan, evaluation_steps
from steerjax.data.packing import Part, check_fits, epoch_rows, fill, lay_out, pack, packing_statistics, unshared_rows
from steerjax.data.trees import grow
from steerjax.errors import DataError
from tests.data.forests import example, prompts, random_examples
from tests.refusals import refused

pytestmark = pytest.mark.short
TREES = grow(prompts([1, 2, 4, 3, 1, 4, 2, 4, 4, 1]))
COUNT = 26


def numbers(trees, rows):
    return sorted(trees[part.tree].examples[e].number for row in rows for part in row for e in part.examples)


def random_or_not(seed, shuffled):
    return np.random.default_rng(seed) if shuffled else None


def seen_by(layout, place):
    """What the token at `place` sees, in order."""
    return np.flatnonzero((np.arange(place + 1) <= place) & (layout.until[: place + 1] > place))


def check_rows(trees, rows, row_length):
    """Each example stands once; at its end a model sees its tokens at its positions, and nothing else; what is learnt
    is what the examples say."""
    count = sum(len(tree.examples) for tree in trees)
    assert numbers(trees, rows) == list(range(count))
    weights, expected = Counter(), Counter()
    for row in rows:
        assert sum(part.length for part in row) <= row_length
        layout = lay_out(trees, row, row_length, "ab")
        used = sum(part.length for part in row)
        assert layout.until[used:].tolist() == list(range(used + 1, row_length + 1))  # padding sees itself
        assert (layout.until[:used] <= used).all()
        assert sum(part.pairs for part in row) == (layout.until - np.arange(row_length))[:used].sum()
        assert len(layout.ends) == sum(len(part.examples) for part in row)
        for found, end in layout.ends:
            places = seen_by(layout, end)
            np.testing.assert_array_equal(layout.tokens[places], found.tokens)
            np.testing.assert_array_equal(layout.positions[places], np.arange(len(places)))
            np.testing.assert_array_equal(layout.targets[found.objective][places[found.places]], found.targets)
            assert (layout.weights[found.objective][places[found.places]] >= found.weights).all()
        for name in "ab":
            learnt = layout.targets[name] >= 0
            assert ((layout.weights[name] > 0) == learnt).all()
            for place in np.flatnonzero(learnt):
                path = tuple(layout.tokens[seen_by(layout, place)])
                weights[name, path, layout.targets[name][place]] += layout.weights[name][place]
    for tree in trees:
        for e in tree.examples:
            for place, target, weight in zip(e.places, e.targets, e.weights, strict=True):
                expected[e.objective, tuple(e.tokens[: place + 1]), target] += weight
    assert weights == expected


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 6), more=st.integers(0, 60), shuffled=st.booleans())
def test_rows_of_any_length_hold_every_example_once(seed, depth, more, shuffled):
    """Trees that are cut included: the path is written again, and each target counts once."""
    examples = random_examples(seed, depth=depth)
    trees, row_length = grow(examples), max(len(e.tokens) for e in examples) + more
    check_rows(trees, pack(trees, row_length, random_or_not(seed, shuffled)), row_length)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), more=st.integers(0, 40), shuffled=st.booleans())
def test_units_are_never_cut(seed, more, shuffled):
    examples = random_examples(seed, units=0.5)
    sizes = defaultdict(int)
    for e in examples:
        sizes[(e.objective, e.unit) if e.unit is not None else e.number] += len(e.tokens)
    trees, row_length = grow(examples), max(sizes.values()) + more
    rows = pack(trees, row_length, random_or_not(seed, shuffled))
    check_rows(trees, rows, row_length)
    where = defaultdict(set)
    for number, row in enumerate(rows):
        for part in row:
            for e in (trees[part.tree].examples[e] for e in part.examples):
                if e.unit is not None:
                    where[e.objective, e.unit].add((number, part))
    assert all(len(parts) == 1 for parts in where.values())


def test_one_row_an_example():
    rows = unshared_rows(TREES)
    assert len(rows) == COUNT
    check_rows(TREES, rows, 64)


def test_targets_of_other_objectives_are_left_out():
    trees = grow(random_examples(0))
    for row in pack(trees, 100):
        whole, alone = lay_out(trees, row, 100, "ab"), lay_out(trees, row, 100, "a")
        np.testing.assert_array_equal(alone.targets["a"], whole.targets["a"])
        assert alone.targets.keys() == alone.weights.keys() == {"a"}


def test_a_tree_that_fits_is_written_once():
    rows = pack(TREES, 200)
    assert sorted(part.tree for row in rows for part in row) == list(range(len(TREES)))
    assert sum(len(row) for row in pack(TREES, 30)) > len(TREES)


def test_what_no_row_can_hold_is_refused():
    check_fits(30, 30)
    for examples in ([example(0, range(1, 32))], [example(i, [i, *range(1, 18)], unit="x") for i in range(2)]):
        with refused(DataError, "30", cure="config.batch.row_length"):
            pack(grow(examples), 30)


def test_epochs_differ_and_repeat():
    first = epoch_rows(TREES, 64, seed=1, epoch=0)
    assert first == epoch_rows(TREES, 64, seed=1, epoch=0)
    assert first != epoch_rows(TREES, 64, seed=1, epoch=1)
    assert first != epoch_rows(TREES, 64, seed=2, epoch=0)
    assert numbers(TREES, first) == list(range(COUNT))


@pytest.mark.parametrize("seed", range(4))
def test_a_part_goes_to_the_fullest_row_with_room_of_such_the_first(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, 300)
    parts = [Part(i, (0,), int(length), 0) for i, length in enumerate(lengths)]
    rows: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: -part.length):
        room = [(32 - sum(p.length for p in row), number) for number, row in enumerate(rows)]
        _, number = min((one for one in room if one[0] >= part.length), default=(0, len(rows)))
        rows += [[]] * (number == len(rows))
        rows[number] = [*rows[number], part]
    assert fill(parts, 32) == [tuple(row) for row in rows]


def neighbours(trees, rows):
    """Pairs of examples that share a row."""
    found = set()
    for row in rows:
        members = numbers(trees, [row])
        found |= {(a, b) for i, a in enumerate(members) for b in members[i + 1 :]}
    return found


def test_one_prompt_with_a_thousand_responses_gives_other_rows_each_epoch():
    trees = grow(prompts([1000]))
    first, second = (epoch_rows(trees, 200, seed=0, epoch=epoch) for epoch in (0, 1))
    assert numbers(trees, first) == numbers(trees, second) == list(range(1000))
    one, other = neighbours(trees, first), neighbours(trees, second)
    by_chance = len(one) / (1000 * 999 / 2)
    assert len(one & other) / len(one) < 3 * by_chance
    assert packing_statistics(trees, first, 200).fill > 0.9


def spread(rows):
    return np.mean([np.std(row) for row in rows])


@pytest.mark.parametrize(("low", "high", "row_length"), [(5, 200, 1000), (50, 150, 1000), (20, 400, 2560)])
def test_lengths_in_a_row_vary_as_in_a_random_draw(low, high, row_length):
    random = np.random.default_rng(0)
    lengths = random.integers(low, high, 2000)
    trees = grow([example(i, [i + 1] * int(n)) for i, n in enumerate(lengths)])
    rows = epoch_rows(trees, row_length, seed=0, epoch=0)
    assert packing_statistics(trees, rows, row_length).fill > 0.975
    found = [[part.length for part in row] for row in rows]
    shuffled = iter(random.permutation(lengths))
    assert spread(found) > 0.75 * spread([[next(shuffled) for _ in row] for row in found])
    assert abs(np.mean([row[0] for row in found]) / lengths.mean() - 1) < 0.2  # nor is a row sorted
    assert abs(np.corrcoef(np.arange(len(found)), [np.mean(row) for row in found])[0, 1]) < 0.3  # nor the epoch


def test_responses_to_one_prompt_vary_in_a_row_as_in_a_random_draw():
    trees = grow(prompts([1000], longest=60))
    rows = epoch_rows(trees, 300, seed=0, epoch=0)
    found = [[len(trees[0].examples[e].tokens) for part in row for e in part.examples] for row in rows]
    shuffled = iter(np.random.default_rng(0).permutation([n for row in found for n in row]))
    assert spread(found) > 0.8 * spread([[next(shuffled) for _ in row] for row in found])


def test_statistics():
    rows = pack(TREES, 64)
    packed, alone = packing_statistics(TREES, rows, 64), packing_statistics(TREES, unshared_rows(TREES), 64)
    assert packed.examples == alone.examples == alone.rows == COUNT
    assert packed.unshared_tokens == alone.tokens == sum(len(e.tokens) for tree in TREES for e in tree.examples)
    assert packed.tokens == sum(tree.length for tree in TREES)
    assert alone.pairs == sum(len(e.tokens) * (len(e.tokens) + 1) // 2 for tree in TREES for e in tree.examples)
    assert packed.pairs < alone.pairs
    assert packed.fill == packed.tokens / (64 * len(rows))
    assert (packed.saving > 1.2, alone.saving) == (True, 1)


@pytest.mark.parametrize("rows_a_step", [1, 3, 4])
def test_steps_see_every_example_once_an_epoch_whatever_the_batch(rows_a_step):
    plan = BatchPlan(TREES, rows_a_step, 64, seed=0)
    total = sum(len(plan.epoch(epoch)) for epoch in range(3))
    seen = [row for step in range(-(-total // rows_a_step)) for row in plan.step_rows(step)][:total]
    assert numbers(TREES, seen) == sorted(list(range(COUNT)) * 3)
    # a plan asked for one late step answers as one that walked there
    assert BatchPlan(TREES, rows_a_step, 64, seed=0).step_rows(5) == plan.step_rows(5)


def test_number_of_steps():
    plan = BatchPlan(TREES, 2, 64, seed=0)
    rows = len(plan.epoch(0))
    assert plan.steps(1) == -(-rows // 2)
    assert plan.steps(0.5) == -(-(rows / 2) // 2)
    assert plan.steps(2.0) == -(-sum(len(plan.epoch(epoch)) for epoch in range(2)) // 2)
    assert BatchPlan(TREES, 1000, 64, seed=0).steps(0.1) == 1


def test_evaluation_steps_have_one_size():
    steps = evaluation_steps(pack(TREES, 40), 4)
    assert {len(step) for step in steps} == {4}
    assert numbers(TREES, [row for step in steps for row in step]) == list(range(COUNT))
