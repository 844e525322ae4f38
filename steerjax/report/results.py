"""How close predicted ratings are to human ones, and what two trivial predictors reach on the same split.

`E` examples (rated responses), `A` attributes; all is float64, and a rating that nobody gave is NaN.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from steerjax.schema import Schema

MODEL, MEAN_RATING, LOG_LENGTH = "model", "mean rating", "log length"
AttributeMetrics = dict[str, dict[str, float | int | None]]


def attribute_metrics(predicted: np.ndarray, ratings: np.ndarray, names: Sequence[str]) -> AttributeMetrics:
    """By name, over the examples with a rating; both arguments are `[E, A]`.

    `mse` (rating squared) and `mae` (rating): None without a rating, not finite where a prediction is not. `pearson`
    and `spearman` (average ranks for ties): None where `correlation` is. `count` of ratings.
    """
    found = {}
    for name, x, y in zip(names, predicted.T, ratings.T, strict=True):
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        pearson = correlation(x, y)
        # The ranks of a column that is constant up to rounding would be ranks of the rounding.
        spearman = None if pearson is None else correlation(rankdata(x), rankdata(y))
        mse, mae = (float(np.mean(np.abs(x - y) ** power)) if len(y) else None for power in (2, 1))
        found[name] = {"mse": mse, "mae": mae, "pearson": pearson, "spearman": spearman, "count": len(y)}
    return found


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r; None for fewer than two pairs, a value that is not finite, or a side constant up to rounding."""
    if len(x) < 2 or not np.isfinite([x, y]).all() or any(np.ptp(z) <= 1e-11 * np.abs(z).max() for z in (x, y)):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def attribute_correlations(ratings: np.ndarray) -> np.ndarray:
    """`correlation` of every two columns `[E, A]` over the examples finite in both: `[A, A]`, NaN where undefined."""
    columns = [(column, np.isfinite(column)) for column in ratings.T]
    return np.array([[correlation(x[s & t], y[s & t]) for y, t in columns] for x, s in columns], np.float64)


def mean_metric(metrics: AttributeMetrics, key: str, names: Iterable[str] | None = None) -> float | None:
    """Mean of one metric over `names` (default: all), where it is defined; None where it nowhere is."""
    values = [metrics[name][key] for name in (metrics if names is None else names)]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def baseline(degree: int, train_ratings: np.ndarray, train_lengths: ArrayLike, lengths: ArrayLike) -> np.ndarray:
    """Each attribute by least squares on log(1 + characters of the response), `[n, A]`; NaN where nothing is rated.

    Args:
        degree: 0 is the mean rating, 1 a line, which is the mean too where all training lengths are equal.
        train_ratings, train_lengths: `[E, A]` and `[E]`. lengths: `[n]`.
    """
    x, columns = np.log1p(train_lengths), []
    for y in train_ratings.T:
        seen = np.isfinite(y)
        fit = np.polyfit(x[seen], y[seen], min(degree, len(np.unique(x[seen])) - 1)) if seen.any() else [np.nan]
        columns.append(np.polyval(fit, np.log1p(lengths)))
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class EvaluationResult:
    """Predicted and human ratings `[E, A]` of one split and what follows from them.

    `metrics` are the model's `attribute_metrics`, `baselines` those of "mean rating" and "log length", fitted on the
    training split.
    """

    schema: Schema
    predicted: np.ndarray
    ratings: np.ndarray
    metrics: AttributeMetrics
    baselines: Mapping[str, AttributeMetrics]
    ids: Sequence[str]

    @property
    def compared(self) -> tuple[str, ...]:
        """The attributes that averages are over: those that the model and each baseline that has any counts for."""
        usable = [m for m in self.baselines.values() if any(entry["count"] for entry in m.values())]
        return tuple(name for name in self.schema.names if all(m[name]["count"] for m in (self.metrics, *usable)))

    def mse(self, *names: str) -> dict[str, float | None]:
        """Mean MSE (rating squared) over `names`, of "model", "mean rating" and "log length"; None if undefined."""
        return {who: mean_metric(m, "mse", names) for who, m in {MODEL: self.metrics, **self.baselines}.items()}

    def average_mse(self) -> dict[str, float | None]:
        return self.mse(*self.compared)


def evaluate_predictions(
    schema: Schema,
    predicted: ArrayLike,
    ratings: ArrayLike,
    lengths: ArrayLike,
    ids: Sequence[str],
    train_ratings: ArrayLike,
    train_lengths: ArrayLike,
) -> EvaluationResult:
    """Metrics of the model and of both baselines on the same ratings.

    Ratings are `[E, A]`, lengths `[E]` characters. An attribute without a rating
    in the training split has no baseline (count 0).
    """
    predicted, ratings, train_ratings = (np.asarray(x, np.float64) for x in (predicted, ratings, train_ratings))
    baselines = {}
    for degree, who in enumerate((MEAN_RATING, LOG_LENGTH)):
        guess = baseline(degree, train_ratings, train_lengths, lengths)
        baselines[who] = attribute_metrics(guess, np.where(np.isfinite(guess), ratings, np.nan), schema.names)
    metrics = attribute_metrics(predicted, ratings, schema.names)
    return EvaluationResult(schema, predicted, ratings, metrics, baselines, ids)


def lowest(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """Who has the lowest finite value; several where they agree to three decimals, none where fewer than two count."""
    finite = {who: round(v, 3) for who, v in values.items() if v is not None and math.isfinite(v)}
    return tuple(who for who, v in finite.items() if v == min(finite.values())) if len(finite) > 1 else ()
