"""What an evaluation of predicted ratings found: the model's metrics beside those of two trivial predictors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerjax.report.metrics import AttributeMetrics, attribute_metrics, length_baseline, mean_baseline, mean_metric
from steerjax.schema import Schema

MODEL, MEAN_RATING, LOG_LENGTH = "model", "mean rating", "log length"


@dataclass(frozen=True)
class EvaluationResult:
    """Predicted and human ratings of one split (E responses, A attributes) and what follows from them.

    Attributes:
        schema: the A attributes with their ranges.
        predicted, ratings: `[E, A]` float64, ratings. mask: `[E, A]`, True where there is a human rating.
        metrics: the model's `attribute_metrics`.
        baselines: the same of "mean rating" and "log length", fitted on the training split.
        ids: the E examples' ids.
    """

    schema: Schema
    predicted: NDArray[np.float64]
    ratings: NDArray[np.float64]
    mask: NDArray[np.bool_]
    metrics: AttributeMetrics
    baselines: Mapping[str, AttributeMetrics]
    ids: tuple[str, ...]

    @property
    def compared(self) -> tuple[str, ...]:
        """The attributes over which averages are taken: those that the model and every baseline have a count for.

        So the averages of model and baselines are over the same ratings. A baseline without any count (no training
        ratings at all) does not limit them.
        """
        usable = [m for m in self.baselines.values() if any(entry["count"] for entry in m.values())]
        return tuple(name for name in self.schema.names if all(m[name]["count"] for m in (self.metrics, *usable)))

    def mse(self, name: str) -> dict[str, float | None]:
        """One attribute's MSE (rating squared) of "model", "mean rating" and "log length"."""
        return {who: metrics[name]["mse"] for who, metrics in ((MODEL, self.metrics), *self.baselines.items())}

    def average_mse(self) -> dict[str, float | None]:
        """Mean of `mse` over `compared`; None where it is undefined."""
        names = self.compared
        return {who: mean_metric(m, "mse", names) for who, m in ((MODEL, self.metrics), *self.baselines.items())}


def evaluate_predictions(
    schema: Schema,
    predicted: ArrayLike,
    ratings: ArrayLike,
    mask: ArrayLike,
    lengths: ArrayLike,
    ids: Sequence[str],
    train_ratings: ArrayLike,
    train_mask: ArrayLike,
    train_lengths: ArrayLike,
) -> EvaluationResult:
    """Metrics of the model and of both baselines on the same ratings.

    Args:
        predicted, ratings, mask: `[E, A]`. lengths: `[E]`, characters of each response. ids: of the E examples.
        train_ratings, train_mask: `[E_train, A]`. train_lengths: `[E_train]`. E_train may be 0; an attribute without a
            training rating has no baseline (count 0).

    Raises:
        ValueError: the shapes do not fit.
    """
    predicted, ratings, train_ratings = (np.asarray(x, dtype=np.float64) for x in (predicted, ratings, train_ratings))
    mask, lengths, train_lengths = np.asarray(mask, dtype=bool), np.asarray(lengths), np.asarray(train_lengths)
    if not len(ids) == len(lengths) == len(ratings) or len(train_ratings) != len(train_lengths):
        counts = (len(ratings), len(lengths), len(ids), len(train_ratings), len(train_lengths))
        raise ValueError("{} examples with {} lengths and {} ids; {} training examples with {} lengths".format(*counts))
    guesses = {
        MEAN_RATING: mean_baseline(train_ratings, train_mask, len(ratings)),
        LOG_LENGTH: length_baseline(train_lengths, train_ratings, train_mask, lengths),
    }
    names = schema.names
    metrics = attribute_metrics(predicted, ratings, mask, names)
    baselines = {who: attribute_metrics(x, ratings, mask & np.isfinite(x), names) for who, x in guesses.items()}
    return EvaluationResult(schema, predicted, ratings, mask, metrics, baselines, tuple(ids))


def lowest(values: Mapping[str, float | None]) -> tuple[str, ...]:
    """Who has the lowest finite value; several where they agree to three decimals, none where fewer than two count."""
    finite = {who: round(v, 3) for who, v in values.items() if v is not None and math.isfinite(v)}
    return tuple(who for who, v in finite.items() if v == min(finite.values())) if len(finite) > 1 else ()
