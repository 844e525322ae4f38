"""Rated answers to groups: which answers have a weight, and what they weigh."""

import numpy as np
import pytest

from steerjax.beta_bins import log_probabilities
from steerjax.inference.importance import Scores
from steerjax.iteration.groups import ALONE, CUT, LONG, TOGETHER, UNRATED, effective_samples, rated_groups
from steerjax.iteration.groups import weighed_groups as weigh
from steerjax.schema import HELPSTEER
from tests.reward_models import write_rows

pytestmark = pytest.mark.short
ASKED = {"helpfulness": 4}
PREDICTED = dict.fromkeys(HELPSTEER.names, 3.2)


def row(name, text, finish="stop", predicted=PREDICTED, prompt="p"):
    turn = {"role": "assistant", "content": text} | ({"predicted_ratings": predicted} if predicted else {})
    turns = [{"role": "user", "content": prompt}, turn]
    return {"turns": turns, "id": name, "generation": {"attributes": ASKED, "finish": finish, "sample": 0}}


def test_answers_of_a_prompt_stand_together(tmp_path):
    """A prompt is told by its text too, as rows may have one name."""
    rows = [
        row("a/b/0", "one"), row("a/b/1", "two", "length"), row("a/b/2", "three", predicted={"helpfulness": 1.0}),
        row("a/b/3", "four"), row("a/b/0", "five", prompt="q"), row("c/0", "six", "length", prompt="q"),
    ]  # fmt: skip
    path = write_rows(tmp_path / "rated.jsonl", rows)
    found, skipped = rated_groups(path, HELPSTEER)
    assert [(one.group.prompt.id, one.group.answers, one.lines) for one in found] == [
        ("a/b", ("one", "four"), (1, 4)), ("a/b", ("five",), (5,))
    ]  # fmt: skip
    assert [turn.content for one in found for turn in one.group.prompt.turns] == ["p", "q"]
    assert found[0].group.asked == ASKED
    assert found[0].predicted.shape == (2, 5)
    assert [(one.line, one.reason) for one in skipped] == [(2, CUT), (3, UNRATED), (6, CUT)]
    assert {one.file for one in skipped} == {str(path)}


def weighed(tmp_path, texts, sampled, prior, row_length=100, answers=(10, 10, 10)):
    path = write_rows(tmp_path / "rated.jsonl", [row(f"a/{n}", text) for n, text in enumerate(texts)])
    scores = [[Scores("a", 20, list(answers), logs)] for logs in (sampled, prior)]
    return weigh(rated_groups(path, HELPSTEER)[0], *scores, HELPSTEER, "middle", row_length)


@pytest.mark.parametrize(
    ("texts", "sampled", "prior", "row_length", "kept", "reasons"),
    [
        (("x", "y", "z"), (-1.0, -2.0, -3.0), (-2.0, -2.0, -2.0), 49, "xyz", []),
        (("x", "y", "z"), (-1.0, -2.0, -3.0), (-2.0, -2.0, -2.0), 48, "", [TOGETHER] * 3),
        (("x", "y", "z"), (None, -2.0, -3.0), (-2.0, -2.0, -2.0), 39, "yz", [LONG]),
        (("x", "y", "z"), (None, -2.0, -3.0), (-2.0, None, -2.0), 99, "", [LONG, LONG, ALONE]),
        (("x", "x", "x"), (-1.0, -1.0, -1.0), (-2.0, -2.0, -2.0), 99, "", [ALONE] * 3),
        (("x", "x", "z"), (-1.0, -1.0, -3.0), (-2.0, -2.0, -2.0), 99, "xxz", []),
    ],
)
def test_what_is_left_out(tmp_path, texts, sampled, prior, row_length, kept, reasons):
    groups, skipped = weighed(tmp_path, texts, list(sampled), list(prior), row_length)
    assert "".join(sample.content for group in groups for sample in group.samples) == kept
    assert [one.reason for one in skipped] == reasons
    for group in groups:
        assert group.asked == ASKED
        expected = log_probabilities(np.array([list(PREDICTED.values())]), HELPSTEER, ASKED)[0]
        assert [s.log_rating for s in group.samples] == [expected] * len(kept)
        assert [s.log_sampled for s in group.samples] == [value for value in sampled if value is not None]


def test_effective_samples(tmp_path):
    for sampled, expected in (([-3.0, -3.0, -3.0], 3), ([-3.0, -3.0, 90.0], 2), ([-3.0, 90.0, 90.0], 1)):
        ((group,), _) = weighed(tmp_path, ("x", "y", "z"), sampled, [-3.0] * 3)
        assert effective_samples(group) == pytest.approx(expected)
