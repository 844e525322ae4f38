"""Ratings as numbers: the squared error of predicted ratings where a rated response ends.

Source: HelpSteer, arXiv 2311.09528, section 4; NeMo-Aligner averages over micro-batches first, we do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import pydantic.dataclasses
from jaxtyping import Array, Float
from pydantic import Field

from steerjax.data.conversation import Conversation
from steerjax.data.packing import Layout
from steerjax.data.trees import Example
from steerjax.errors import ConfigError, DataError
from steerjax.objectives.objective import TRAIN, VALIDATION, Evaluation, Objective, Setting
from steerjax.schema import Schema
from steerjax.typed import STRICT

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RegressionConfig:
    """Masked mean squared error.

    Attributes:
        weight: of the objective among others.
        average: over all ratings of a step, or over examples, each the mean of its own ratings (NeMo-Aligner with
            micro-batch 1).
        attribute_weights: by name; attributes that are not named weigh 1.
    """

    weight: Weight = 1.0
    average: Literal["ratings", "examples"] = "ratings"
    attribute_weights: Mapping[str, Weight] = field(default_factory=dict)

    def check(self, schema: Schema) -> None:
        """Raises ConfigError: a weight of an attribute that is not rated, or none above 0."""
        for name in self.attribute_weights:
            if name not in schema.names:
                cure = f"cure: use {', '.join(schema.names)}"
                raise ConfigError(f"config.regression.attribute_weights: {name} is not rated; {cure}")
        if not self.weights(schema).any():
            raise ConfigError("config.regression.attribute_weights are all 0; cure: one above 0, or nothing is trained")

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

    Args:
        counts: how many ratings a place stands for, 0 where there is none.
        weights: of the attributes; a rating counts with its attribute's weight.
        average: "ratings", every rating counts alike; "examples", every example counts alike with the mean over its
            own ratings, which is what the reference computes with micro-batch 1.
    """
    errors = jnp.square(jnp.where(counts > 0, predictions.astype(jnp.float32) - ratings, 0.0))
    weighted = counts * weights.astype(jnp.float32)
    if average == "ratings":
        return (weighted * errors).sum(), weighted.sum()
    total = weighted.sum(-1)
    examples = jnp.where(total > 0, counts.max(-1), 0.0)
    return (examples * (weighted * errors).sum(-1) / jnp.where(total > 0, total, 1.0)).sum(), examples.sum()


class Ratings:
    """Rated responses of one split, E examples.

    Attributes:
        rows: of each its ratings [A], NaN where missing.
        lengths: characters of the response.
        ids: of the conversations.
        shared: rated turns that are part of several conversations, and count once.
    """

    def __init__(self):
        self.rows: list[tuple[float, ...]] = []
        self.lengths: list[int] = []
        self.ids: list[str] = []
        self.seen: set[str] = set()
        self.shared = self.unrated = 0

    def arrays(self, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
        """Ratings, 0 where missing, and where they are: float32 and bool [E A]."""
        ratings = np.array(self.rows, np.float32).reshape(-1, len(schema))
        return np.nan_to_num(ratings), ~np.isnan(ratings)


class Regression(Objective):
    """Every rated assistant turn is an example that ends where its reward is read."""

    name, kind, Config = "regression", "reward", RegressionConfig

    def __init__(self, config: RegressionConfig, setting: Setting):
        super().__init__(config, setting)
        self.data = {TRAIN: Ratings(), VALIDATION: Ratings()}
        self._codes: dict[tuple[float, ...], int] = {}  # ratings -> the target that stands for them
        self._weights = config.weights(setting.schema)
        self._ratings = np.zeros((1, len(setting.schema)), np.float32)  # of each code; set when the data is read
        self._mask = self._ratings > 0

    def examples(self, conversation: Conversation, split: str) -> list[Example]:
        schema, data = self.setting.schema, self.data[split]
        found = []
        for index, turn in enumerate(conversation.turns):
            if not turn.ratings:
                continue
            tokens, root = self.setting.renderer.reward_tokens(conversation, index)
            row = tuple(turn.ratings.get(name, float("nan")) for name in schema.names)
            found.append((turn, tokens, root, row))
        data.unrated += not found
        examples = []
        for turn, tokens, root, row in found:
            if turn.id and turn.id in data.seen:
                data.shared += 1
                continue
            data.seen.add(turn.id)
            code = self._codes.setdefault(tuple(-1e30 if x != x else x for x in row), len(self._codes))
            last, target, one = np.array([[len(tokens) - 1], [code], [1]], np.int32)
            number = len(data.rows)
            examples.append(Example(self.name, number, tokens, root, last, target, one.astype(np.float32)))
            data.rows.append(row)
            data.lengths.append(len(turn.content))
            data.ids.append(conversation.id)
        return examples

    def check_data(self) -> None:
        for split, data in self.data.items():
            if not data.rows:
                names = ", ".join(self.setting.schema.names)
                raise DataError(f"no rated response for {split}", cure=f"rate turns with {names}, or name the schema")
        table = np.array(list(self._codes), np.float32)
        self._mask = table > -1e29
        self._ratings = np.where(self._mask, table, 0)

    def arrays(self, layout: Layout) -> dict[str, np.ndarray]:
        """ratings: float32 [T A]. counts: float32 [T A], how many ratings of that value end there."""
        codes, counts = layout.targets[self.name], layout.weights[self.name]
        here = (codes >= 0)[:, None]
        return {
            "ratings": np.where(here, self._ratings[codes], 0).astype(np.float32),
            "counts": np.where(here & self._mask[codes], counts[:, None], 0).astype(np.float32),
        }

    def count(self, arrays):
        return self._error(arrays["ratings"], arrays)[1]

    def loss(self, model, hidden, batch, arrays):
        predicted, counts = self.outputs(model, hidden, batch, arrays), arrays["counts"]
        errors = counts * jnp.square(jnp.where(counts > 0, predicted - arrays["ratings"], 0.0))
        places = tuple(range(counts.ndim - 1))
        each = zip(self.setting.schema.names, errors.sum(places), counts.sum(places), strict=True)
        return self._error(predicted, arrays)[0], {f"attributes/{name}/mse": (x, n) for name, x, n in each}

    def outputs(self, model, hidden, batch, arrays):
        """Predicted ratings [B T A]."""
        return model.head(model.read(hidden, batch.until))

    def first_sums(self, model, hidden, batch, arrays):
        """The sum of the states that are read, float32 [D], and their count."""
        present = arrays["counts"].max(-1)
        return jnp.einsum("BTD,BT->D", model.read(hidden, batch.until), present), present.sum()

    def first_parameters(self, params, sums):
        """A head whose first predictions lie near the mean ratings.

        The states of all responses share a large common part. Without a bias the head is that mean state, scaled so
        that it maps itself to the means.
        """
        total, count = sums
        ratings, mask = self.data[TRAIN].arrays(self.setting.schema)
        means = ratings.sum(0, dtype=np.float64) / np.maximum(mask.sum(0), 1)
        means = means.astype(np.float32)
        if "reward_bias" in params:
            return {"reward_head": params["reward_head"] * 0, "reward_bias": jnp.asarray(means)}
        mean = total / jnp.maximum(count, 1)
        return {"reward_head": jnp.outer(mean / jnp.sum(jnp.square(mean)), means)}

    def evaluate(self, steps: Sequence[tuple[list[Layout], np.ndarray]]) -> Evaluation:
        from steerjax.report.results import evaluate_predictions

        schema, data = self.setting.schema, self.data[VALIDATION]
        ratings, mask = data.arrays(schema)
        predicted = np.zeros_like(ratings)
        for layouts, outputs in steps:
            for layout, output in zip(layouts, outputs, strict=True):
                ends = [(e.number, place) for e, place in layout.ends if e.objective == self.name]
                if ends:
                    numbers, places = np.array(ends).T
                    predicted[numbers] = output[places]
        total, count = masked_squared_error(
            predicted, ratings, mask.astype(np.float32), self._weights, self.config.average
        )
        train = self.data[TRAIN]
        result = evaluate_predictions(
            schema, predicted, ratings, mask, data.lengths, data.ids, *train.arrays(schema), train.lengths
        )
        values = {
            f"attributes/{name}/{metric}": value
            for name, metrics in result.metrics.items()
            for metric, value in metrics.items()
            if metric != "count"
        }
        return Evaluation(float(total / count), values, result)

    def facts(self) -> dict:
        mask = self.data[TRAIN].arrays(self.setting.schema)[1]
        columns = zip(self.setting.schema.names, mask.any(0), self._weights, strict=True)
        return {"rated_attributes": [name for name, present, weight in columns if present and weight]}

    def summary(self) -> dict[str, str]:
        said = {}
        for split, data in self.data.items():
            mask = data.arrays(self.setting.schema)[1]
            missing = [n for n, present in zip(self.setting.schema.names, mask.any(0), strict=True) if not present]
            words = [f"{len(data.rows)} rated responses"]
            words += [f"none rated for {', '.join(missing)}"] if missing else []
            words += [f"{data.unrated} conversations without a rating"] if data.unrated else []
            words += [f"{data.shared} turns that stand in several conversations count once"] if data.shared else []
            said[f"regression, {split}"] = "; ".join(words)
        return said

    def report(self, evaluation: Evaluation, folder: Path | None, records, summary, config_text: str) -> str:
        from steerjax.report.page import format_table, write_report

        if folder is not None:
            write_report(folder, evaluation.detail, records, summary, config_text)
        return format_table(evaluation.detail)

    def _error(self, predicted, arrays):
        counts = arrays["counts"]
        return masked_squared_error(predicted, arrays["ratings"], counts, self._weights, self.config.average)
