"""How close predicted ratings are to human ones, and what two trivial predictors reach on the same split.

`E` examples (rated responses), `A` attributes; all is float64, and a rating that nobody gave is NaN.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from steerjax.schema import Attribute, Schema

MODEL, MEAN_RATING, LOG_LENGTH = "model", "mean rating", "log length"
AttributeMetrics = dict[str, dict[str, float | int | None]]


def attribute_metrics(predicted: np.ndarray, ratings: np.ndarray, schema: Schema) -> AttributeMetrics:
    """By name, over the examples with a rating; both arguments are `[E, A]`.

    `mse` (rating squared) and `mae` (rating): None without a rating, not finite where a prediction is not. `pearson`
    and `spearman` (average ranks for ties): None where `correlation` is. `kappa`: see `quadratic_kappa`. `count` of
    ratings.
    """
    columns = zip(schema.attributes, predicted.T, ratings.T, strict=True)
    pairs = {attribute: (x[np.isfinite(y)], y[np.isfinite(y)]) for attribute, x, y in columns}
    return {
        attribute.name: {key: of(x, y, attribute) for key, of in _METRICS.items()} | {"count": len(y)}
        for attribute, (x, y) in pairs.items()
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r; None for fewer than two pairs, a value that is not finite, or a side constant up to rounding."""
    if len(x) < 2 or not np.isfinite([x, y]).all() or any(np.ptp(z) <= 1e-11 * np.abs(z).max() for z in (x, y)):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def whole(ratings: np.ndarray, attribute: Attribute) -> np.ndarray:
    """Clipped to the range and rounded, halves up."""
    return np.floor(np.clip(ratings, attribute.low, attribute.high) + 0.5)


def quadratic_kappa(x: np.ndarray, y: np.ndarray, attribute: Attribute) -> float | None:
    """Quadratic-weighted kappa of `whole` ratings.

    One less the mean squared error over what it would be if the pairs were shuffled; None where that is 0 or a value
    is not finite. Source: Cohen, Psychological Bulletin 70 (1968).
    """
    return kappa_of_whole(whole(x, attribute), whole(y, attribute))


def kappa_of_whole(x: np.ndarray, y: np.ndarray) -> float | None:
    """`quadratic_kappa` of ratings that are whole."""
    if not len(y) or not np.isfinite([x, y]).all():
        return None
    shuffled = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(1 - np.mean((x - y) ** 2) / shuffled) if shuffled else None


def rater_pairs(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of two raters' ratings of an answer, of `[N, R]`, so that nobody stands first."""
    first, second = np.nonzero(~np.eye(ratings.shape[1], dtype=bool))
    x, y = ratings[:, first].ravel(), ratings[:, second].ravel()
    both = np.isfinite(x) & np.isfinite(y)
    return x[both], y[both]


def pooled_kappa(x: np.ndarray, others: np.ndarray) -> tuple[float, int]:
    """Quadratic-weighted kappa of `x` `[N]` with every rating of `others` `[N, R]`, pairs together; and how many."""
    both = np.isfinite(x)[:, None] & np.isfinite(others)
    kappa = kappa_of_whole(np.broadcast_to(x[:, None], others.shape)[both], others[both])
    return (np.nan if kappa is None else kappa), int(both.sum())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's, average ranks for ties; None where `correlation` is.

    The ranks of a column that is constant up to rounding would be ranks of the rounding.
    """
    from scipy.stats import rankdata  # a third of the time from the command to the first step

    return None if correlation(x, y) is None else correlation(rankdata(x), rankdata(y))


def calibration_slope(predicted: np.ndarray, ratings: np.ndarray) -> float | None:
    """By how much ratings rise, in the mean, where predictions rise by 1; None where `correlation` is."""
    r = correlation(predicted, ratings)
    return None if r is None else float(r * ratings.std() / predicted.std())


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray, Attribute], float | None]] = {
    "mse": lambda x, y, _: float(np.mean((x - y) ** 2)) if len(y) else None,
    "mae": lambda x, y, _: float(np.mean(np.abs(x - y))) if len(y) else None,
    "pearson": lambda x, y, _: correlation(x, y),
    "spearman": lambda x, y, _: rank_correlation(x, y),
    "kappa": quadratic_kappa,
}


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

    `guesses` are the predictions `[E, A]` of "mean rating" and "log length", fitted on the training split; NaN where
    they have none. `metrics` are the model's `attribute_metrics`, `baselines` theirs. `units`: the prompt of each
    response, where intervals are over prompts.
    """

    schema: Schema
    predicted: np.ndarray
    ratings: np.ndarray
    guesses: Mapping[str, np.ndarray]
    metrics: AttributeMetrics
    baselines: Mapping[str, AttributeMetrics]
    ids: Sequence[str]
    units: Sequence | None = None

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

    def interval(self, key: str, less: str | None = None) -> tuple[float, float] | None:
        """95% of the model's average `key` (mse, pearson or kappa) over `compared`, had other such responses been
        rated; with `less`, of what it is more than that baseline's.

        The percentile bootstrap over the E responses, or over `units` (1,000 draws, seed 0); None for less than two, or
        where a draw leaves it undefined.
        """
        units = np.arange(len(self.ids)) if self.units is None else np.unique(self.units, return_inverse=True)[1]
        random, count, draws = np.random.default_rng(0), len(np.unique(units)), []
        if count < 2:
            return None
        for _ in range(0, 1000, 100):  # so that no large split needs much memory
            times = random.multinomial(count, np.full(count, 1 / count), 100).astype(np.float64)[:, units]
            value = self._resampled(key, self.predicted, times)
            draws.append(value - self._resampled(key, self.guesses[less], times) if less else value)
        low, high = np.percentile(draws, [2.5, 97.5]).tolist() if np.isfinite(draws).all() else (np.nan, np.nan)
        return (low, high) if np.isfinite(low) else None

    def _resampled(self, key: str, predicted: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The average of `key` when responses stand there `times` `[draws, E]`; `[draws]`, NaN where undefined."""
        found = []
        with np.errstate(all="ignore"):  # of an attribute that a draw has not
            for name in self.compared:
                column, attribute = self.schema.names.index(name), self.schema[name]
                seen = np.isfinite(self.ratings[:, column])
                x, y, n = predicted[seen, column], self.ratings[seen, column], times[:, seen]
                if key == "kappa":
                    x, y = whole(x, attribute), whole(y, attribute)
                n, x, y = n / n.sum(1, keepdims=True), x - y.mean(), y - y.mean()
                mean_x, mean_y = n @ x, n @ y
                both, var_x, var_y = n @ (x * y) - mean_x * mean_y, n @ (x * x) - mean_x**2, n @ (y * y) - mean_y**2
                shuffled = var_x + var_y + (mean_x - mean_y) ** 2
                values = {"mse": shuffled - 2 * both, "pearson": both / np.sqrt(var_x * var_y),
                          "kappa": 2 * both / shuffled}  # fmt: skip
                found.append(values[key])
        return np.mean(found, axis=0) if found else np.full(len(times), np.nan)


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
    fits = enumerate((MEAN_RATING, LOG_LENGTH))
    guesses = {who: baseline(degree, train_ratings, train_lengths, lengths) for degree, who in fits}
    baselines = {
        who: attribute_metrics(guess, np.where(np.isfinite(guess), ratings, np.nan), schema)
        for who, guess in guesses.items()
    }
    metrics = attribute_metrics(predicted, ratings, schema)
    return EvaluationResult(schema, predicted, ratings, guesses, metrics, baselines, ids)


def lowest(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """Who has the lowest finite value; several where they agree to three decimals, none where fewer than two count."""
    finite = {who: round(v, 3) for who, v in values.items() if v is not None and math.isfinite(v)}
    return tuple(who for who, v in finite.items() if v == min(finite.values())) if len(finite) > 1 else ()
