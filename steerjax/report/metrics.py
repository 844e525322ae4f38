"""How close predicted ratings are to human ones, and what two trivial predictors reach on the same split.

`E` examples (rated responses), `A` attributes. A mask is True where a person gave a rating; what `ratings` holds
elsewhere (NaN, -100, ...) is never read. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

AttributeMetrics = dict[str, dict[str, float | int | None]]


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
    ratings, mask = _ratings_and_mask(ratings, mask)
    predicted = np.asarray(predicted, dtype=np.float64)
    if predicted.shape != ratings.shape or ratings.shape[1] != len(names):
        raise ValueError(
            f"predicted {predicted.shape} and ratings {ratings.shape} must both be [examples, {len(names)}]"
        )
    return {name: _column_metrics(predicted[mask[:, a], a], ratings[mask[:, a], a]) for a, name in enumerate(names)}


def mean_metric(metrics: AttributeMetrics, key: str, names: Iterable[str] | None = None) -> float | None:
    """Unweighted mean of one metric over `names` (default: all) where it is defined; None where it nowhere is."""
    values = [metrics[name][key] for name in (metrics if names is None else names)]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def mean_baseline(train_ratings: ArrayLike, train_mask: ArrayLike, n: int) -> NDArray[np.float64]:
    """Predicts each attribute's mean rating in the training split (`[E, A]`) n times: `[n, A]`.

    An attribute without a training rating is NaN: no baseline is better than an invented one.
    """
    ratings, mask = _ratings_and_mask(train_ratings, train_mask)
    return np.tile([_mean(ratings[mask[:, a], a]) for a in range(ratings.shape[1])], (n, 1))


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
    predicted = mean_baseline(ratings, mask, len(x))
    for a in range(ratings.shape[1]):
        x_seen, y_seen = train_x[mask[:, a]], ratings[mask[:, a], a]
        if len(y_seen) >= 2 and not _is_constant(x_seen):
            centred = x_seen - x_seen.mean()
            predicted[:, a] += (centred @ y_seen) / (centred @ centred) * (x - x_seen.mean())
    return predicted


def attribute_correlations(ratings: ArrayLike, mask: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation of every two attributes (`[E, A]`) over the examples rated for both: `[A, A]`, symmetric.

    NaN with fewer than two such examples or where one of the two is constant on them.
    """
    ratings, mask = _ratings_and_mask(ratings, mask)
    matrix = np.full((ratings.shape[1],) * 2, np.nan)
    for a, b in zip(*np.triu_indices(len(matrix)), strict=True):
        both = mask[:, a] & mask[:, b]
        x, y = ratings[both, a], ratings[both, b]
        if _can_correlate(x, y):
            matrix[a, b] = matrix[b, a] = stats.pearsonr(x, y).statistic
    return matrix


def _ratings_and_mask(ratings: ArrayLike, mask: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    ratings, mask = np.asarray(ratings, dtype=np.float64), np.asarray(mask, dtype=bool)
    if ratings.ndim != 2 or ratings.shape != mask.shape:
        raise ValueError(f"ratings {ratings.shape} and mask {mask.shape} must both be [examples, attributes]")
    return ratings, mask


def _column_metrics(predicted: NDArray[np.float64], ratings: NDArray[np.float64]) -> dict[str, float | int | None]:
    found = dict.fromkeys(("mse", "mae", "pearson", "spearman")) | {"count": len(ratings)}
    if len(ratings) == 0:
        return found
    if not np.isfinite(predicted).all():
        return found | {"mse": float("nan"), "mae": float("nan")}
    error = predicted - ratings
    found |= {"mse": float(np.mean(error**2)), "mae": float(np.mean(np.abs(error)))}
    # Of a column that is constant up to rounding, Spearman's ranks would be ranks of the rounding.
    if _can_correlate(predicted, ratings):
        found["pearson"] = float(stats.pearsonr(predicted, ratings).statistic)
        found["spearman"] = float(stats.spearmanr(predicted, ratings).statistic)
    return found


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _can_correlate(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    return len(x) >= 2 and not _is_constant(x) and not _is_constant(y)


def _is_constant(values: NDArray[np.float64]) -> bool:
    """Whether all values are equal up to float64 rounding (wider than where `scipy.stats.pearsonr` warns)."""
    return bool(np.linalg.norm(values - values.mean()) <= 1e-11 * abs(values.mean()) or np.ptp(values) == 0)
