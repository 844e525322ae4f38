"""What the steerability report says, and what its plots are given."""

from pathlib import Path

import numpy as np
import pytest

from steerjax.evaluation.steerability import goal_space, measured
from steerjax.evaluation.steering_answers import SteeredAnswer
from steerjax.evaluation.steering_measures import columns, measure, trends
from steerjax.evaluation.steering_report import Found, draw, report_text
from steerjax.report.figures import figures
from steerjax.schema import Schema, make_schema
from tests.evaluation.test_steering_measures import answer

LONG = "how_far_it_goes_beyond_the_question"
SCHEMA = make_schema("helpsteer", [("wit", 0, 4), (LONG, 1, 10), ("depth", 1, 5)])
NEUTRAL = {"wit": 2.0, LONG: 4.0, "depth": 3.0}


def found_of(answers) -> Found:
    rows = [measured(each, goal_space(SCHEMA), NEUTRAL, None) for each in answers]
    table = columns(rows)
    return Found(SCHEMA, Schema(SCHEMA.attributes), NEUTRAL, table, figures(measure, table), trends(rows, table))


@pytest.fixture(scope="module")
def swept() -> Found:
    """Wit and the long one were swept, depth was not; every wit is predicted 2 or a little more, one long one is out of
    its range; 3 answers of 30 were cut."""
    random, answers = np.random.default_rng(0), []
    for prompt in "abcdef":
        asks = [NEUTRAL, *(NEUTRAL | {"wit": n} for n in (0.0, 4.0)), *(NEUTRAL | {LONG: n} for n in (1.0, 10.0))]
        for asked in asks:
            predicted = {"wit": 2 + 0.3 * random.random(), LONG: asked[LONG] + random.normal(0, 0.3), "depth": 3.0}
            answers.append(answer(prompt, asked, "word " * random.integers(5, 9), predicted))
    answers[-1].predicted[LONG] = 15.0
    cut = (SteeredAnswer(each.conversation, each.requested, each.predicted, True) for each in answers[:3])
    return found_of([*cut, *answers[3:]])


def test_what_is_said(swept):
    text = report_text(swept)
    assert "3 of 30 answers were cut at the limit of tokens" in text
    assert f"{LONG} 100% (33%)" in next(line for line in text.splitlines() if line.startswith("rounded prediction"))
    assert "wit: every prediction rounds to one rating" in text
    assert swept.figures["wit/exact"].value is None
    assert swept.figures[f"{LONG}/exact"].value == 1 > 0.5 > swept.figures[f"{LONG}/exact by chance"].value


def test_only_requests_that_differ_count_as_met():
    """Most answers of a sweep ask for the neutral rating; a model that moves by nothing must not look exact."""
    asks = [NEUTRAL | {"wit": n} for n in (0.0, 2.0, 4.0)] + [NEUTRAL | {"depth": n} for n in (1.0, 5.0)]
    made = [answer(p, asked, "x", {"wit": 1.0 + (p == "a"), "depth": 3.0}) for p in "ab" for asked in asks]
    exact = found_of(made).figures["wit/exact"]
    assert (exact.value, exact.count) == (pytest.approx(1 / 6), 6)


@pytest.mark.filterwarnings("error")
def test_plots_show_what_was_swept_over_the_schemas_ranges(swept, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, file, **_: drawn.setdefault(Path(file.name).name[1:].partition(".partial")[0], figure),
    )
    assert set(draw(swept, tmp_path)) == set(drawn) == {"curves.png", "leakage.png", "obtained.png"}
    curves = drawn["curves.png"]
    assert "3 of 30 answers were cut" in curves.get_suptitle()
    rows = np.reshape(curves.axes, (2, -1))  # depth has no row
    assert [axes.get_title(loc="left") for axes in rows[:, 0]] == ["wit", LONG]
    wit, long = rows[:, 0]
    assert wit.get_xlim() == wit.get_ylim() == pytest.approx((-0.24, 4.24))
    assert long.get_xlim() == pytest.approx((0.46, 10.54))
    assert long.get_ylim()[0] == pytest.approx(0.46)
    assert len({axes.get_ylim() for axes in rows[:, 1]}) == 1  # characters, for both
    mean, equal = wit.lines
    assert mean.get_xdata().tolist() == [0, 2, 4]
    assert mean.get_ydata().tolist() == pytest.approx([swept.figures[f"wit={n}/predicted"].value for n in (0, 2, 4)])
    assert list(equal.get_xdata()) == list(equal.get_ydata())
    assert wit.collections  # intervals
    assert all(axes.get_legend() is None for figure in drawn.values() for axes in figure.axes)
    panels = {axes.get_title(loc="left"): axes for axes in drawn["obtained.png"].axes if axes.get_visible()}
    assert set(panels) == {"wit", LONG}
    assert panels[LONG].get_xlim() == panels[LONG].get_ylim()
    assert [text.get_text() for text in panels[LONG].texts] == ["1 beyond the axes"]


def test_a_plot_of_one_rating_alone(tmp_path):
    """Nothing was swept: what came out is drawn, and nothing is said to be met."""
    found = found_of([answer(p, {"wit": 4.0, LONG: 4.0, "depth": 3.0}, "x", {"wit": 4.0}) for p in "ab"])
    assert found.figures["wit/exact"].value is None
    assert "rounded prediction" not in report_text(found)
    assert {"curves.png", "obtained.png"} == set(draw(found, tmp_path))
