"""The packing plan: whole, within bounds, a pure function of its arguments."""

import numpy as np
import pytest

from steerjax.data.batch import BatchPlan, evaluation_steps, row_arrays
from steerjax.data.packing import (
    check_fits,
    epoch_rows,
    pack,
    packing_statistics,
    row_pairs,
    share_prompts,
    unpacked_rows,
)
from steerjax.errors import DataError
from steerjax.models.attention.mask import Layout, allowed
from tests.helpers import random_groups

pytestmark = pytest.mark.short
GROUPS = random_groups([1, 2, 4, 3, 1, 4, 2, 4, 4, 1])


def examples(groups, rows):
    return sorted(groups[s.group].branches[b].example for row in rows for s in row for b in s.branches)


@pytest.mark.parametrize("row_length", [40, 64, 200])
@pytest.mark.parametrize("most", [1, 2, 8])
def test_every_response_stands_once_and_rows_hold(row_length, most):
    rows = pack(GROUPS, row_length, most, range(len(GROUPS)))
    assert examples(GROUPS, rows) == list(range(26))
    for row in rows:
        assert sum(s.length for s in row) <= row_length
        assert sum(len(s.branches) for s in row) <= most
        for s in row:
            prompt, branches = GROUPS[s.group].prompt, [GROUPS[s.group].branches[b] for b in s.branches]
            assert s.length == len(prompt) + sum(len(branch.tokens) for branch in branches)


def test_epochs_differ_and_repeat():
    first = epoch_rows(GROUPS, 64, 8, seed=1, epoch=0)
    assert first == epoch_rows(GROUPS, 64, 8, seed=1, epoch=0)
    assert first != epoch_rows(GROUPS, 64, 8, seed=1, epoch=1)
    assert first != epoch_rows(GROUPS, 64, 8, seed=2, epoch=0)


def test_a_prompt_is_written_again_only_when_the_row_is_full():
    rows = pack(GROUPS, 200, 8, range(len(GROUPS)))
    segments = [s.group for row in rows for s in row]
    assert len(segments) == len(GROUPS)
    assert len([s for row in pack(GROUPS, 40, 8, range(len(GROUPS))) for s in row]) > len(GROUPS)


def test_steps_see_every_example_once_an_epoch_whatever_the_batch():
    for rows_a_step in (1, 3, 4):
        plan = BatchPlan(tuple(GROUPS), rows_a_step, 64, 8, seed=0)
        total = plan.epoch_start(3)
        seen = [row for step in range(-(-total // rows_a_step)) for row in plan.step_rows(step)][:total]
        assert examples(GROUPS, seen) == sorted(list(range(26)) * 3)
        # a plan asked for one late step answers as one that walked there
        assert BatchPlan(tuple(GROUPS), rows_a_step, 64, 8, seed=0).step_rows(5) == plan.step_rows(5)


def test_number_of_steps():
    plan = BatchPlan(tuple(GROUPS), 2, 64, 8, seed=0)
    rows = len(plan.epoch(0))
    assert plan.steps(1) == -(-rows // 2)
    assert plan.steps(0.5) == -(-(rows / 2) // 2)
    assert plan.steps(2.0) == -(-plan.epoch_start(2) // 2)


def test_positions_branches_and_ends():
    groups = random_groups([2])
    (row,) = pack(groups, 100, 4, [0])
    arrays = row_arrays(groups, row, 100, 4)
    P = len(groups[0].prompt)
    R0, R1 = (len(b.tokens) for b in groups[0].branches)
    np.testing.assert_array_equal(arrays.positions[: P + R0], np.arange(P + R0))
    np.testing.assert_array_equal(arrays.positions[P + R0 : P + R0 + R1], np.arange(P, P + R1))
    np.testing.assert_array_equal(arrays.branches[: P + R0 + R1], [0] * P + [1] * R0 + [2] * R1)
    assert arrays.ends[:2].tolist() == [P + R0 - 1, P + R0 + R1 - 1]
    assert arrays.examples.tolist() == [0, 1, -1, -1]
    assert not arrays.segments[P + R0 + R1 :].any()


def test_pairs_are_those_of_the_mask():
    for row in pack(GROUPS, 64, 8, range(len(GROUPS))):
        arrays = row_arrays(GROUPS, row, 64, 8)
        layout = Layout(arrays.segments[None], arrays.branches[None])
        mask = np.asarray(allowed(layout, layout))[0]
        assert mask[arrays.segments > 0].sum() == row_pairs(GROUPS, row)


def test_statistics():
    rows = pack(GROUPS, 64, 8, range(len(GROUPS)))
    statistics = packing_statistics(GROUPS, rows, 64)
    alone = packing_statistics(GROUPS, unpacked_rows(GROUPS), 64)
    assert statistics.examples == alone.examples == 26
    assert statistics.unshared_tokens == alone.tokens == alone.unshared_tokens
    assert statistics.fill == statistics.tokens / (64 * len(rows))
    assert statistics.saving > 1.2


def test_evaluation_steps_have_one_size():
    steps = evaluation_steps(pack(GROUPS, 40, 8, range(len(GROUPS))), 4)
    assert {len(step) for step in steps} == {4}
    assert examples(GROUPS, [row for step in steps for row in step]) == list(range(26))


def test_too_long_is_refused():
    check_fits(10, 20, 30)
    with pytest.raises(DataError, match=r"10 prompt and 21 response tokens do not fit a row of 30\n  cure: raise"):
        check_fits(10, 21, 30)


def shared(sequences, row_length=64):
    """Groups of (prompt, response) pairs without ratings."""
    prompts, responses = ([np.array(x, np.int32) for x in part] for part in zip(*sequences, strict=True))
    none = np.zeros((len(sequences), 1), np.float32)
    return share_prompts(prompts, responses, none, none > 0, row_length)


def test_turns_of_a_conversation_share_one_prompt():
    """The second turn's prompt holds the first turn and its end; another answer branches off where it differs."""
    (group,) = shared([([1, 2], [3, 9]), ([1, 2, 3, 9, 4], [5, 9]), ([1, 2], [3, 8, 9]), ([1, 2, 3, 9, 4], [6])])
    assert group.prompt.tolist() == [1, 2, 3, 9, 4]
    found = [(b.example, b.at, b.tokens.tolist()) for b in group.branches]
    assert found == [(2, 3, [8, 9]), (0, 4, []), (1, 5, [5, 9]), (3, 5, [6])]
    (row,) = pack([group], 16, 8, [0])
    arrays = row_arrays([group], row, 16, 8)
    assert arrays.tokens[:10].tolist() == [1, 2, 3, 8, 9, 9, 4, 5, 9, 6]
    assert arrays.positions[:10].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 5]
    assert arrays.branches[:10].tolist() == [0, 0, 0, 1, 1, 0, 0, 3, 3, 4]
    assert arrays.ends[:4].tolist() == [4, 5, 8, 9]
    assert row_pairs([group], row) == 15 + (2 * 3 + 3) + (2 * 5 + 3) + (5 + 1)


def test_what_does_not_fit_keeps_its_own_prompt():
    sequences = [([1, 2], [3, 9]), ([1, 2, 3, 4, 5, 6], [7])]
    assert len(shared(sequences, row_length=8)) == 1
    assert len(shared([([1, 2], [3, 9, 9, 9]), sequences[1]], row_length=8)) == 2
