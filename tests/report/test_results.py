import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from steerjax.report.figures import UNIT, figures
from steerjax.report.results import (
    attribute_correlations,
    attribute_metrics,
    baseline,
    calibration_slope,
    evaluate_predictions,
    kappa_of_whole,
    mean_metric,
    quadratic_kappa,
    rank_correlation,
)
from steerjax.schema import Attribute, Schema


def _schema(names):
    return Schema(tuple(Attribute(name) for name in names))


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _column(predicted, ratings, mask=None):
    ratings = np.where(True if mask is None else mask, ratings, np.nan)
    return attribute_metrics(np.c_[predicted], np.c_[ratings], _schema("a"))["a"]


def test_hand_computed():
    entry = _column([1.0, 2.0, 4.0], [0, 2, 3])
    assert entry["mse"] == pytest.approx((1 + 0 + 1) / 3)
    assert entry["mae"] == pytest.approx(2 / 3)
    # Centred: (-4, -1, 5)/3 and (-5, 1, 4)/3: 39 / sqrt(42 * 42).
    assert entry["pearson"] == pytest.approx(39 / 42)
    assert entry["spearman"] == pytest.approx(1.0)
    assert entry["count"] == 3


def test_ties_take_average_ranks():
    # Ranks (1, 2.5, 2.5, 4) and (1.5, 1.5, 3, 4); centred: products add up to 3.75, squares to 4.5 and 4.5.
    assert _column([0, 1, 1, 2], [0, 0, 1, 2])["spearman"] == pytest.approx(3.75 / 4.5)


def test_masked_places_are_never_read():
    entry = _column([1.0, np.nan, 4.0, np.inf], [0, -100, 3, np.nan], [1, 0, 1, 0])
    assert entry == _column([1.0, 4.0], [0, 3])


def test_random_data_with_masks_equals_scipy():
    rng = np.random.default_rng(0)
    ratings = rng.integers(0, 5, (200, 3)).astype(np.float64)
    predicted = (ratings * 0.3 + rng.normal(size=(200, 3))).round(1)
    mask = rng.random((200, 3)) < 0.6
    metrics = attribute_metrics(predicted, np.where(mask, ratings, np.nan), _schema("abc"))
    for a, name in enumerate("abc"):
        x, y = predicted[mask[:, a], a], ratings[mask[:, a], a]
        assert metrics[name]["count"] == mask[:, a].sum()
        assert metrics[name]["mse"] == pytest.approx(np.mean((x - y) ** 2), rel=1e-12)
        assert metrics[name]["mae"] == pytest.approx(np.mean(np.abs(x - y)), rel=1e-12)
        assert metrics[name]["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
        assert metrics[name]["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert mean_metric(metrics, "mse") == pytest.approx(np.mean([metrics[name]["mse"] for name in "abc"]))


@pytest.mark.parametrize(
    ("predicted", "ratings"),
    [
        ([2, 2, 2], [0, 1, 2]),
        ([0, 1, 2], [3, 3, 3]),
        ([1.0], [2.0]),
        # Constant but for float64 rounding.
        ([0.1 + 0.2, 0.3, 0.3], [0, 1, 2]),
    ],
)
def test_correlation_undefined(predicted, ratings):
    entry = _column(predicted, ratings)
    assert entry["pearson"] is None
    assert entry["spearman"] is None
    assert entry["mse"] is not None


def test_attribute_without_ratings():
    metrics = attribute_metrics(np.ones((2, 2)), np.array([[0, np.nan]] * 2), _schema("ab"))
    assert metrics["b"] == {"mse": None, "mae": None, "pearson": None, "spearman": None, "kappa": None, "count": 0}
    assert mean_metric(metrics, "mse") == 1.0
    assert mean_metric(metrics, "mse", ["b"]) is None


def test_prediction_that_is_not_finite_is_not_hidden():
    entry = _column([1.0, np.nan], [1, 2])
    assert math.isnan(entry["mse"])
    assert entry["pearson"] is None
    assert math.isnan(mean_metric({"a": entry}, "mse"))


def test_shapes_must_fit():
    with pytest.raises(ValueError):
        attribute_metrics(np.zeros((2, 2)), np.zeros((2, 2)), _schema("a"))
    with pytest.raises(IndexError):
        attribute_metrics(np.zeros((1, 1)), np.zeros((2, 1)), _schema("a"))


def test_mean_baseline():
    predicted = baseline(0, np.array([[1, np.nan, np.nan], [2, 4, np.nan]]), [5, 6], [1, 2, 3])
    np.testing.assert_allclose(predicted, [[1.5, 4, np.nan]] * 3, rtol=1e-15)


def test_length_baseline_equals_polyfit():
    rng = np.random.default_rng(1)
    lengths, new_lengths = rng.integers(0, 4000, 80), rng.integers(0, 4000, 20)
    ratings, mask = rng.integers(0, 5, (80, 3)).astype(float), rng.random((80, 3)) < 0.7
    predicted = baseline(1, np.where(mask, ratings, np.nan), lengths, new_lengths)
    for a in range(3):
        line = np.polyfit(np.log1p(lengths[mask[:, a]]), ratings[mask[:, a], a], 1)
        np.testing.assert_allclose(predicted[:, a], np.polyval(line, np.log1p(new_lengths)), rtol=1e-10)


def test_length_baseline_falls_back_to_the_mean():
    nan = np.nan
    predicted = baseline(1, np.array([[1, 3, nan], [2, nan, nan], [4, nan, nan]]), [10, 10, 10], [5, 500])
    np.testing.assert_allclose(predicted, [[7 / 3, 3, np.nan]] * 2)


def test_correlations_are_pairwise_complete():
    rng = np.random.default_rng(2)
    ratings, mask = rng.normal(size=(50, 4)), rng.random((50, 4)) < 0.8
    ratings[:, 3] = 2.0
    matrix = attribute_correlations(np.where(mask, ratings, np.nan))
    both = mask[:, 0] & mask[:, 1]
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(stats.pearsonr(ratings[both, 0], ratings[both, 1]).statistic)
    np.testing.assert_allclose(np.diag(matrix)[:3], 1.0)
    assert np.isnan(matrix[3]).all()
    assert np.isnan(matrix[:, 3]).all()


def test_kappa_by_the_matrix_of_counts():
    """Cohen's weighted kappa as it is defined, on the whole ratings of a range of its own."""
    rng = np.random.default_rng(3)
    ratings = rng.integers(1, 6, 300).astype(float)
    predicted = ratings + rng.normal(size=300)
    counts = np.zeros((5, 5))
    for x, y in zip(predicted, ratings, strict=True):
        counts[int(min(max(math.floor(x + 0.5), 1), 5)) - 1, int(y) - 1] += 1
    cost = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
    chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    expected = 1 - (cost * counts).sum() / (cost * chance).sum()
    assert quadratic_kappa(predicted, ratings, Attribute("a", 1, 5)) == pytest.approx(expected, rel=1e-12)
    assert quadratic_kappa(np.ones(3), np.ones(3), Attribute("a")) is None
    assert quadratic_kappa(np.array([np.nan, 1]), np.array([0, 1.0]), Attribute("a")) is None


def test_intervals_are_those_of_metrics_on_drawn_rows():
    rng = np.random.default_rng(4)
    ratings = rng.integers(0, 5, (60, 2)).astype(float)
    ratings[rng.random((60, 2)) < 0.2] = np.nan
    predicted = np.nan_to_num(ratings, nan=2) * 0.5 + rng.normal(size=(60, 2))
    result = evaluate_predictions(
        _schema("ab"), predicted, ratings, rng.integers(1, 99, 60), range(60), ratings, rng.integers(1, 99, 60)
    )
    drawn = rng.integers(0, 60, (1000, 60))
    for key in ("mse", "pearson", "kappa"):
        values = [mean_metric(attribute_metrics(predicted[d], ratings[d], _schema("ab")), key) for d in drawn]
        low, high = result.interval(key)
        width = high - low
        assert np.percentile(values, [2.5, 97.5]) == pytest.approx((low, high), abs=0.1 * width)
        assert low < mean_metric(result.metrics, key) < high
    low, high = result.interval("mse", less="mean rating")
    assert low < result.average_mse()["model"] - result.average_mse()["mean rating"] < high
    apart, twice = result.interval("mse"), replace(result, units=[number // 2 for number in range(60)])
    columns = {UNIT: np.array(twice.units), "p": predicted, "y": ratings}
    drawn = figures(
        lambda c: {"mse": (mean_metric(attribute_metrics(c["p"], c["y"], _schema("ab")), "mse"), 60)}, columns
    )["mse"].interval
    assert twice.interval("mse") != apart
    assert twice.interval("mse") == pytest.approx(drawn, abs=0.1 * (drawn[1] - drawn[0]))
    one = evaluate_predictions(_schema("a"), [[1.0]], [[2.0]], [7], ["x"], np.empty((0, 1)), [])
    assert one.interval("pearson") is None


@pytest.mark.short
def test_kappa_and_calibration_equal_scikit_learns_and_scipys():
    """`cohen_kappa_score(x, y, weights="quadratic")` of scikit-learn 1.9.1 on these numbers."""
    random = np.random.default_rng(7)
    x = random.integers(0, 5, 60)
    y = np.clip(x + random.integers(-2, 3, 60), 0, 4)
    assert kappa_of_whole(x, y) == pytest.approx(0.6147332768839966, abs=1e-12)
    assert calibration_slope(x.astype(float), y.astype(float)) == pytest.approx(stats.linregress(x, y).slope, abs=1e-12)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
