"""Intervals and paired differences: numbers by hand, coverage by simulation, units that are drawn together."""

import numpy as np
import pytest

from steerjax.errors import DataError
from steerjax.report.figures import UNIT, differences, figures, mean_of
from tests.refusals import refused

pytestmark = pytest.mark.short


def measure(columns):
    return {"mean": mean_of(columns["x"]), "share": mean_of((columns["x"] > 0).astype(float))}


def columns(x, units=None):
    return {"x": np.asarray(x, np.float64), UNIT: np.arange(len(x)) if units is None else np.asarray(units)}


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    x = np.random.default_rng(0).normal(2, 3, 400)
    found = figures(measure, columns(x))["mean"]
    assert found.value == pytest.approx(x.mean())
    assert found.count == 400
    half = 1.96 * x.std() / 20
    np.testing.assert_allclose(found.interval, (x.mean() - half, x.mean() + half), atol=0.06)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random, hits = np.random.default_rng(1), 0
    for trial in range(60):
        low, high = figures(measure, columns(random.normal(1, 1, 50)), seed=trial)["mean"].interval
        hits += low <= 1 <= high
    assert 50 <= hits <= 60


def test_rows_of_a_unit_are_drawn_together():
    """Ten copies of each row say no more than one."""
    x = np.random.default_rng(2).normal(size=40)
    alone = figures(measure, columns(x))["mean"].interval
    together = figures(measure, columns(np.repeat(x, 10), np.repeat(np.arange(40), 10)))["mean"].interval
    apart = figures(measure, columns(np.repeat(x, 10)))["mean"].interval
    np.testing.assert_allclose(together, alone, atol=0.05)
    assert apart[1] - apart[0] < 0.5 * (alone[1] - alone[0])


def test_undefined_figures_have_neither_value_nor_interval():
    assert figures(measure, columns([np.nan, np.nan]))["mean"] == (None, 0, None)
    assert figures(measure, columns([3.0]))["mean"] == (3.0, 1, None)


def test_paired_differences():
    """The pairs' own noise is gone; units are told by name, whatever their order."""
    random = np.random.default_rng(3)
    hard = random.normal(0, 5, 80)
    one, other = hard + random.normal(0.5, 0.2, 80), hard
    order = random.permutation(80)
    found = differences(measure, columns(one[order], order), columns(other))["mean"]
    assert found.value == pytest.approx((one - other).mean())
    assert found.interval[0] > 0.4
    assert found.p < 0.005
    swapped = differences(measure, columns(other), columns(one[order], order))["mean"]
    assert swapped.value == pytest.approx(-found.value)
    same = differences(measure, columns(hard), columns(hard + random.normal(0, 0.2, 80)))["mean"]
    assert same.p > 0.05
    assert differences(measure, columns(hard), columns(hard))["mean"].p == 1


def test_a_figure_that_some_draws_have_not():
    """A category of 5 rows in 80: some draws have none of them, and leave the figure out or undefined."""
    rare = np.arange(80) < 5

    def of(columns):
        seen = columns["x"][columns["rare"]]
        return {"undefined": mean_of(seen)} | ({"left out": mean_of(seen)} if len(seen) else {})

    one, other = (columns(x) | {"rare": rare} for x in np.random.default_rng(3).normal([[0.3], [0]], 1, (2, 80)))
    found = differences(of, one, other)
    assert found["left out"] == found["undefined"]
    assert 0 < found["left out"].p <= 1


def test_only_shared_units_are_compared():
    found = differences(measure, columns([1, 2, 3], [0, 1, 2]), columns([5, 7], [1, 2]))["mean"]
    assert (found.value, found.count) == (pytest.approx(2.5 - 6), 2)
    with refused(DataError, "no row in common", cure="same data"):
        differences(measure, columns([1.0], [0]), columns([1.0], [1]))
    with refused(DataError, "numbers of rows", cure="same data"):
        differences(measure, columns([1, 2], [0, 0]), columns([1], [0]))
