"""Trees: every example is a path, what can be shared is written once, and no target is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerjax.data.packing import lay_out, pack
from steerjax.data.trees import grow
from tests.data.forests import example, prompts, random_examples

pytestmark = pytest.mark.short


def text(tree, e):
    return [token for node in tree.paths[e] for token in tree.pieces[node].tolist()]


def test_a_prompt_and_its_responses():
    examples = [example(0, [1, 2, 3, 4]), example(1, [1, 2, 5]), example(2, [9, 2, 3]), example(3, [1, 2, 3, 7])]
    first, second = grow(examples)
    assert [e.number for e in first.examples] == [0, 1, 3]
    assert sorted(map(tuple, first.pieces)) == [(1, 2), (3,), (4,), (5,), (7,)]
    assert (first.length, second.length) == (6, 3)


def test_one_example_may_end_inside_another():
    (tree,) = grow([example(0, [1, 2, 3]), example(1, [1, 2]), example(2, [1, 2, 3])])
    assert sorted(map(tuple, tree.pieces)) == [(1, 2), (3,)]
    assert [text(tree, e) for e in range(3)] == [[1, 2, 3], [1, 2], [1, 2, 3]]
    assert tree.paths[0] == tree.paths[2]


def test_the_root_must_be_shared():
    assert len(grow([example(0, [1, 2, 3], root=3), example(1, [1, 2, 4], root=3)])) == 2
    assert len(grow([example(0, [1, 2, 3], root=2), example(1, [1, 2, 4], root=2)])) == 1


def test_the_token_before_targets_that_differ_is_written_once_a_branch():
    (tree,) = grow([example(0, [1, 2, 3], targets={1: 5}), example(1, [1, 2, 4], targets={1: 6})])
    assert sorted(map(tuple, tree.pieces)) == [(1,), (2, 3), (2, 4)]
    (tree,) = grow([example(0, [1, 2, 3], targets={1: 5}), example(1, [1, 2, 3], targets={1: 6})])
    assert sorted(map(tuple, tree.pieces)) == [(1,), (2, 3), (2, 3)]


def test_equal_targets_and_those_of_other_objectives_are_shared():
    others = example(0, [1, 2, 3], targets={1: 5}), example(1, [1, 2, 4], targets={1: 6}, objective="b")
    same = example(2, [1, 2, 5], targets={1: 5}, weights=[3])
    (tree,) = trees = grow([*others, same])
    assert sorted(map(tuple, tree.pieces)) == [(1, 2), (3,), (4,), (5,)]
    layout = lay_out(trees, pack(trees, 8)[0], 8, "ab")
    assert layout.targets["a"][:2].tolist() == [-1, 5]
    assert layout.weights["a"][:2].tolist() == [0, 4]  # weights of merged places add up
    assert (layout.targets["b"][1], layout.weights["b"][1]) == (6, 1)


def test_a_unit_is_in_one_tree_whatever_it_shares():
    examples = [example(0, [1, 2], unit="x"), example(1, [3, 4], unit="x"), example(2, [3, 4, 5])]
    first, second = grow(examples)
    assert [[e.number for e in tree.examples] for tree in (first, second)] == [[0, 1], [2]]
    assert first.units == ((0, 1),)
    assert len(grow([example(0, [1, 2], unit=0), example(1, [3, 4], unit=0, objective="b")])) == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 6), units=st.sampled_from([0.0, 0.4]))
def test_random_examples_are_paths(seed, depth, units):
    examples = random_examples(seed, depth=depth, units=units)
    trees = grow(examples)
    assert sorted(e.number for tree in trees for e in tree.examples) == list(range(len(examples)))
    for tree in trees:
        assert all(parent < node for node, parent in enumerate(tree.parents))
        assert sorted(e for unit in tree.units for e in unit) == list(range(len(tree.examples)))
        for e, path in enumerate(tree.paths):
            assert text(tree, e) == tree.examples[e].tokens.tolist()
            assert [tree.parents[node] for node in path] == [-1, *path[:-1]]
        if units == 0:
            assert len({tuple(e.tokens[:2]) for e in tree.examples}) == 1


def test_without_targets_equal_beginnings_are_written_once():
    """As few tokens as there are different beginnings."""
    examples = [example(e.number, e.tokens, 1) for e in random_examples(3, count=60)]
    beginnings = {tuple(e.tokens[: i + 1]) for e in examples for i in range(len(e.tokens))}
    assert sum(tree.length for tree in grow(examples)) == len(beginnings)


def test_many_responses_to_one_prompt():
    (tree,) = grow(prompts([500]))
    assert tree.length < sum(len(e.tokens) for e in tree.examples) / 1.5
    np.testing.assert_array_equal(tree.pieces[0], tree.examples[0].tokens[: len(tree.pieces[0])])
