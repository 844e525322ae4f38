"""How close predicted ratings are to human ones, and what two trivial predictors reach on the same split.

`E` examples (rated responses), `A` attributes. A mask is True where a person gave a rating; what `ratings` holds
elsewhere (NaN, -100, ...) is never read. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

AttributeMetrics = dict[str, dict[str, float | int | None]]


class PaperStatistics(NamedTuple):
    """One row of HelpSteer's Table 2: mean and standard deviation of the ratings, Pearson R with helpfulness."""

    mean: float
    std: float
    helpfulness_r: float


# arXiv 2311.09528, Table 2: all 37,120 samples. Of the correlations, the paper prints only those with helpfulness.
PAPER_STATISTICS: dict[str, PaperStatistics] = {
    "helpfulness": PaperStatistics(2.7856, 0.9793, 1.0),
    "correctness": PaperStatistics(2.8369, 0.9935, 0.8525),
    "coherence": PaperStatistics(3.2991, 0.7699, 0.6348),
    "complexity": PaperStatistics(1.4423, 0.8205, 0.2361),
    "verbosity": PaperStatistics(1.5331, 0.9287, 0.2555),
}


def attribute_metrics(
    predicted: ArrayLike, ratings: ArrayLike, mask: ArrayLike, names: Sequence[str]
) -> AttributeMetrics:
    """Errors and correlations of each attribute over the examples that have a rating for it.

    Args:
        predicted, ratings: `[E, A]`, ratings.
        mask: `[E, A]`, True where there is a rating.
        names: the A attributes in order.

    Returns:
        By name: `mse` (rating squared) and `mae` (rating), None without a rating, NaN where a prediction is not finite;
        `pearson` and `spearman` (average ranks for ties), None with fewer than two ratings, where either side is
        constant, or where a prediction is not finite; `count`, the number of ratings.

    Raises:
        ValueError: the shapes do not fit.
    """
    predicted, ratings, mask = _checked(predicted, ratings, mask, len(names))
    return {name: _column_metrics(predicted[mask[:, a], a], ratings[mask[:, a], a]) for a, name in enumerate(names)}


def mean_metric(metrics: AttributeMetrics, key: str, names: Iterable[str] | None = None) -> float | None:
    """Unweighted mean of one metric over `names` (default: all) where it is defined; None where it nowhere is."""
    values = [metrics[name][key] for name in (metrics if names is None else names)]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def mean_mse(metrics: AttributeMetrics) -> float:
    """Unweighted mean MSE (rating squared) over the attributes with a rating; NaN if none has one."""
    value = mean_metric(metrics, "mse")
    return float("nan") if value is None else value


def mean_baseline(train_ratings: ArrayLike, train_mask: ArrayLike, n: int) -> NDArray[np.float64]:
    """Predicts each attribute's mean rating in the training split.

    Args:
        train_ratings, train_mask: `[E, A]`.
        n: number of predictions.

    Returns:
        `[n, A]`. An attribute without a training rating is NaN: no baseline is better than an invented one.
    """
    ratings, mask = _ratings_and_mask(train_ratings, train_mask)
    means = [_mean(ratings[mask[:, a], a]) for a in range(ratings.shape[1])]
    return np.tile(np.asarray(means, dtype=np.float64), (n, 1))


def length_baseline(
    train_lengths: ArrayLike, train_ratings: ArrayLike, train_mask: ArrayLike, lengths: ArrayLike
) -> NDArray[np.float64]:
    """Predicts each attribute by a least-squares line on log(1 + response length), fitted on the training split.

    Args:
        train_lengths: `[E]`, characters. train_ratings, train_mask: `[E, A]`.
        lengths: `[n]`, characters, of the responses to predict.

    Returns:
        `[n, A]`. The mean with fewer than two training ratings or all of one length; NaN with no training rating.
    """
    ratings, mask = _ratings_and_mask(train_ratings, train_mask)
    train_x, x = (np.log1p(np.asarray(values, dtype=np.float64)) for values in (train_lengths, lengths))
    predicted = np.empty((len(x), ratings.shape[1]))
    for a in range(ratings.shape[1]):
        x_seen, y_seen = train_x[mask[:, a]], ratings[mask[:, a], a]
        predicted[:, a] = _mean(y_seen)
        if len(y_seen) >= 2 and not _is_constant(x_seen):
            centred = x_seen - x_seen.mean()
            predicted[:, a] += (centred @ y_seen) / (centred @ centred) * (x - x_seen.mean())
    return predicted


def attribute_correlations(ratings: ArrayLike, mask: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation of every two attributes over the examples rated for both.

    Args:
        ratings, mask: `[E, A]`.

    Returns:
        `[A, A]`, symmetric; NaN with fewer than two such examples or where one of the two is constant on them.
    """
    ratings, mask = _ratings_and_mask(ratings, mask)
    size = ratings.shape[1]
    matrix = np.full((size, size), np.nan)
    for a in range(size):
        for b in range(a, size):
            both = mask[:, a] & mask[:, b]
            r = _pearson(ratings[both, a], ratings[both, b])
            matrix[a, b] = matrix[b, a] = np.nan if r is None else r
    return matrix


def _ratings_and_mask(ratings: ArrayLike, mask: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    ratings, mask = np.asarray(ratings, dtype=np.float64), np.asarray(mask, dtype=bool)
    if ratings.ndim != 2 or ratings.shape != mask.shape:
        raise ValueError(f"ratings {ratings.shape} and mask {mask.shape} must both be [examples, attributes]")
    return ratings, mask


def _checked(predicted: ArrayLike, ratings: ArrayLike, mask: ArrayLike, size: int):
    ratings, mask = _ratings_and_mask(ratings, mask)
    predicted = np.asarray(predicted, dtype=np.float64)
    if predicted.shape != ratings.shape or ratings.shape[1] != size:
        raise ValueError(f"predicted {predicted.shape} and ratings {ratings.shape} must both be [examples, {size}]")
    return predicted, ratings, mask


def _column_metrics(predicted: NDArray[np.float64], ratings: NDArray[np.float64]) -> dict[str, float | int | None]:
    count = len(ratings)
    if count == 0:
        return {"mse": None, "mae": None, "pearson": None, "spearman": None, "count": 0}
    if not np.isfinite(predicted).all():
        return {"mse": float("nan"), "mae": float("nan"), "pearson": None, "spearman": None, "count": count}
    error = predicted - ratings
    pearson = _pearson(predicted, ratings)
    # Ranks of a column that is constant up to rounding would be ranks of the rounding.
    spearman = None if pearson is None else _pearson(rankdata(predicted), rankdata(ratings))
    return {
        "mse": float(np.mean(error**2)),
        "mae": float(np.mean(np.abs(error))),
        "pearson": pearson,
        "spearman": spearman,
        "count": count,
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _is_constant(values: NDArray[np.float64]) -> bool:
    """Whether all values are equal up to float64 rounding (the threshold of `scipy.stats.pearsonr`'s warning)."""
    spread = np.linalg.norm(values - values.mean())
    return bool(spread <= 1e-13 * abs(values.mean()) or np.ptp(values) == 0)


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    if len(x) < 2 or _is_constant(x) or _is_constant(y):
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))
