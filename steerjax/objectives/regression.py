"""Ratings as numbers: the squared error of predicted ratings where a rated response ends.

Source: HelpSteer, arXiv 2311.09528, section 4; NeMo-Aligner averages over micro-batches first, we do not.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pydantic.dataclasses
from jaxtyping import Array, Float

from steerjax.data.trees import Example
from steerjax.errors import ConfigError
from steerjax.objectives.objective import TRAIN, VALIDATION, Evaluation, ObjectiveConfig
from steerjax.objectives.rated_turns import RatedTurns
from steerjax.schema import Schema
from steerjax.typed import STRICT, NotNegative, PositiveFloat


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RegressionConfig(ObjectiveConfig):
    """Masked mean squared error.

    It is the `average` over all ratings of a step, or over examples, each the mean of its own ratings (NeMo-Aligner
    with micro-batch 1).

    Squared error predicts the mean of alike responses, so predictions vary less than ratings do, by their correlation
    r. With `stretch` s a target is mean + s (rating - mean), mean the attribute's in the training split; with 1 / r
    predictions vary as ratings do, which is best for quadratic kappa and worse for MSE.
    """

    average: Literal["ratings", "examples"] = "ratings"  # what the loss is the mean of
    stretch: PositiveFloat = 1.0  # how much further than the ratings the targets are from their mean
    attribute_weights: Mapping[str, NotNegative] = field(default_factory=dict)  # attribute -> weight; 1 where not named

    def check(self, schema: Schema) -> None:
        """Raises ConfigError: a weight of an attribute that is not rated, or none above 0."""
        where = "config.regression.attribute_weights"
        for name in self.attribute_weights.keys() - set(schema.names):
            raise ConfigError(f"{where}: {name} is not rated; cure: use {', '.join(schema.names)}")
        if not self.weights(schema).any():
            raise ConfigError(f"{where} are all 0; cure: one above 0, or nothing is trained")

    def weights(self, schema: Schema) -> np.ndarray:
        """float32 [A]."""
        return np.array([self.attribute_weights.get(name, 1.0) for name in schema.names], np.float32)


def masked_squared_error(
    predictions: Float[Array, "*E A"],
    ratings: Float[Array, "*E A"],
    counts: Float[Array, "*E A"],
    weights: Float[Array, " A"],
    average: str = "ratings",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and count in float32; sum over count is the loss, after micro-batches and devices are added up.

    `counts` says how many ratings a place stands for, 0 where there is none; a rating counts with its attribute's
    weight. With `average` "examples" every example counts alike, with the mean over its own ratings.
    """
    errors = jnp.square(jnp.where(counts > 0, predictions.astype(jnp.float32) - ratings, 0.0))
    weighted = counts * weights.astype(jnp.float32)
    if average == "ratings":
        return (weighted * errors).sum(), weighted.sum()
    total = weighted.sum(-1)
    examples = jnp.where(total > 0, counts.max(-1), 0.0)
    return (examples * (weighted * errors).sum(-1) / jnp.where(total > 0, total, 1.0)).sum(), examples.sum()


class Regression(RatedTurns):
    """An example ends where its turn's reward is read."""

    name, kind, Config = "regression", "reward", RegressionConfig

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self._weights = config.weights(setting.schema)
        self._codes: dict[tuple, int] = {}  # ratings -> the target that stands for them
        self._of_codes = self.table([(None,) * len(setting.schema)])  # the last, -1, is for places without ratings

    def render(self, conversation, turn):
        return self.setting.renderer.reward_tokens(conversation, turn)

    def example(self, split: str, tokens: np.ndarray, root: int, ratings: Mapping[str, float]) -> Example:
        """Of a text whose ratings are read at its last token."""
        number, row = self.keep(split, ratings)
        code = self._codes.setdefault(row, len(self._codes))
        last, target, one = np.array([[len(tokens) - 1], [code], [1]], np.int32)
        return Example(self.name, number, tokens, root, last, target, one.astype(np.float32))

    def check_data(self):
        super().check_data()
        self._of_codes = np.concatenate([self.table(list(self._codes)), self._of_codes[-1:]])
        ratings = self.table(self.data[TRAIN].rows)
        means = np.nansum(ratings, 0, np.float64) / np.maximum(np.isfinite(ratings).sum(0), 1)
        self._means = means.astype(np.float32)  # of the training split; 0 where nothing is rated

    def arrays(self, layout):
        """ratings: float32 [T A]. counts: float32 [T A], how many ratings of that value end there."""
        ratings = self._of_codes[layout.targets[self.name]]
        counts = np.where(np.isnan(ratings), 0, layout.weights[self.name][:, None])
        return {"ratings": np.nan_to_num(ratings), "counts": counts.astype(np.float32)}

    def _error(self, predicted, ratings, counts):
        stretched = ratings if self.config.stretch == 1 else self._means + self.config.stretch * (ratings - self._means)
        return masked_squared_error(predicted, stretched, counts, self._weights, self.config.average)

    def count(self, arrays):
        return self._error(arrays["ratings"], **arrays)[1]

    def loss(self, model, hidden, batch, arrays):
        predicted, counts = self.outputs(model, hidden, batch, arrays), arrays["counts"]
        errors = counts * jnp.square(jnp.where(counts > 0, predicted - arrays["ratings"], 0.0))
        places = tuple(range(counts.ndim - 1))
        each = zip(self.setting.schema.names, errors.sum(places), counts.sum(places), strict=True)
        return self._error(predicted, **arrays)[0], {f"attributes/{name}/mse": (x, n) for name, x, n in each}

    def outputs(self, model, hidden, batch, arrays):
        """Predicted ratings [B T A]."""
        return model.head(model.read(hidden, batch.until))

    def first_sums(self, model, hidden, batch, arrays):
        """The sum of the states that are read, float32 [D], and their count."""
        ends = arrays["counts"].max(-1)
        return jnp.einsum("BTD,BT->D", model.read(hidden, batch.until), ends), ends.sum()

    def first_parameters(self, params, sums):
        """A head whose first predictions lie near the mean ratings.

        The states of all responses share a large common part. Without a bias the head is that mean state, scaled so
        that it maps itself to the means.
        """
        if "reward_bias" in params:
            return {"reward_head": params["reward_head"] * 0, "reward_bias": jnp.asarray(self._means)}
        mean = sums[0] / jnp.maximum(sums[1], 1)
        return {"reward_head": jnp.outer(mean / jnp.sum(jnp.square(mean)), self._means)}

    def evaluate(self, steps):
        from steerjax.report.results import evaluate_predictions

        data, train = self.data[VALIDATION], self.data[TRAIN]
        ratings, known = self.table(data.rows), self.table(train.rows)
        predicted = np.zeros_like(ratings)
        for example, output in self.read_ends(steps):
            predicted[example.number] = output
        total, count = self._error(predicted, ratings, np.isfinite(ratings).astype(np.float32))
        seen = predicted, ratings, data.lengths, data.ids
        result = evaluate_predictions(self.setting.schema, *seen, known, train.lengths)
        values = {f"attributes/{name}/{key}": x for name, found in result.metrics.items() for key, x in found.items()}
        values = {name: x for name, x in values.items() if not name.endswith("/count")}
        return Evaluation(float(total / count), values, result)

    def facts(self):
        weighted = {name for name, weight in zip(self.setting.schema.names, self._weights, strict=True) if weight}
        return {"rated_attributes": [name for name in self.rated(TRAIN) if name in weighted]}

    def report(self, evaluation, folder, records, summary, config_text):
        from steerjax.report.page import format_table, write_report

        if folder is not None:
            write_report(folder, evaluation.detail, self.losses(records), summary, config_text)
        return format_table(evaluation.detail)
