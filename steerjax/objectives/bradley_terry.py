"""Preferences: of two responses to a prompt, the one that people prefer is to have the higher score.

Source: Bradley and Terry (1952); HelpSteer2-Preference, arXiv 2410.01257, for `margin` and `scaled`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic.dataclasses
from jaxtyping import Array, Float
from pydantic import Field

from steerjax.data.trees import Example
from steerjax.errors import ConfigError, DataError
from steerjax.objectives.objective import TRAIN, VALIDATION, Evaluation, Objective, ObjectiveConfig
from steerjax.schema import Attribute, Schema
from steerjax.typed import STRICT

Weight = Annotated[float, Field(ge=-1e30, le=1e30)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class BradleyTerryConfig(ObjectiveConfig):
    """The preferred of two responses is to score higher. A pair's scores differ by d; its strength is m, 1 where the
    data has none. The loss is

    `regular`: -log sigmoid(d); `margin`: -log sigmoid(d - m); `scaled`: -m log sigmoid(d).

    The score is a weighted sum of attributes (`{"helpfulness": 0.65, "correctness": 0.8}`); without any, an output of
    its own, called `preference`.
    """

    loss: Literal["regular", "margin", "scaled"] = "regular"  # how a row's strength counts
    score: Mapping[str, Weight] = field(default_factory=dict)  # attribute -> weight; none: an output of its own

    def check(self, schema: Schema) -> None:
        """Raises ConfigError: a weight of an attribute that the model does not predict, or none but 0."""
        where = "config.bradley_terry.score"
        for name in self.score.keys() - set(schema.names):
            raise ConfigError(f"{where}: {name} is not predicted; cure: use {', '.join(schema.names)}, or none")
        if self.score and not any(self.score.values()):
            raise ConfigError(f"{where} has no weight but 0; cure: one that is not, or none at all")


# The range is for labels and plots; a score has none.
PREFERENCE = Attribute("preference", -10.0, 10.0, "how much a response is preferred, in logits")


def preference_loss(difference: Float[Array, "*P"], strength: Float[Array, "*P"], loss: str) -> Float[Array, "*P"]:
    """Of each pair; see `BradleyTerryConfig`. float32."""
    scale, margin = strength if loss == "scaled" else 1.0, strength if loss == "margin" else 0.0
    return -scale * jax.nn.log_sigmoid(difference - margin)


@dataclass
class Pairs:
    """Pairs of one split: strength, characters of both responses and conversation of each."""

    strengths: list[float] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    single: int = 0  # conversations without another response
    rated: int = 0  # of them
    undecided: int = 0


class BradleyTerry(Objective):
    """Both responses of a pair are examples of one unit, which packing never cuts; example 2p is the preferred one."""

    name, kind, Config = "bradley_terry", "reward", BradleyTerryConfig

    @staticmethod
    def predicts(config, schema):
        return tuple(a for a in schema.attributes if a.name in config.score) or (PREFERENCE,)

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.data = {TRAIN: Pairs(), VALIDATION: Pairs()}
        score = config.score or {PREFERENCE.name: 1.0}
        self._weights = np.array([score.get(name, 0.0) for name in setting.schema.names], np.float32)
        self._all = Pairs()  # of both splits, by the number that stands in the targets

    def examples(self, conversation, split):
        data = self.data[split]
        if not conversation.rejected:
            data.single += 1
            data.rated += any(turn.ratings for turn in conversation.turns)
            return []
        sides = [self.setting.renderer.reward_tokens(each, len(each.turns) - 1) for each in conversation.both()]
        for tokens, _ in sides:
            self.setting.check_length(len(tokens))
        if not conversation.strength:
            data.undecided += 1
            return []
        lengths = tuple(len(turns[-1].content) for turns in (conversation.turns, conversation.rejected))
        return self.pair(split, sides, conversation.strength, lengths, conversation.id)

    def pair(self, split, sides, strength: float = 1.0, lengths=(0, 0), id: str = "") -> list[Example]:
        """Of two texts with their roots, the preferred first; scores are read at their last tokens."""
        number, data = len(self._all.strengths), self.data[split]
        for pairs in (data, self._all):
            pairs.strengths.append(strength)
            pairs.lengths.append(lengths)
            pairs.ids.append(id)
        first = 2 * (len(data.strengths) - 1)
        root = min(root for _, root in sides)
        return [
            Example(
                self.name, first + side, tokens, root, np.array([len(tokens) - 1], np.int32),
                np.array([2 * number + side], np.int32), np.ones(1, np.float32), unit=number,
            )
            for side, (tokens, _) in enumerate(sides)
        ]  # fmt: skip

    def check_data(self):
        for split, data in self.data.items():
            if not data.strengths:
                what, cure = f"no pair of responses for {split}", "rows with 'chosen' and 'rejected' (docs/formats.md)"
                if data.rated:
                    what += f", and {data.rated} conversations with ratings"
                    cure = (
                        "config.objectives=('regression',) learns from ratings, and `steerjax prepare --pairs NAME` "
                        f"makes pairs of them; or {cure}"
                    )
                raise DataError(what, cure=cure)
        if self.config.loss != "regular" and set(self._all.strengths) == {1.0}:
            cure = "rows that say how much (margin, preference_strength), or 'regular'"
            raise DataError(
                f"config.bradley_terry.loss is '{self.config.loss}', and every pair has strength 1", cure=cure
            )

    def arrays(self, layout):
        """Where a preferred response ends: `other` int32 [T], the place where the other ends; `strengths` and `weights`
        float32 [T], 0 elsewhere."""
        targets, weights = layout.targets[self.name], layout.weights[self.name]
        places = {int(target): place for place, target in enumerate(targets) if target >= 0}
        other, strengths = np.zeros(len(targets), np.int32), np.zeros(len(targets), np.float32)
        for target, place in places.items():
            if target % 2 == 0:
                other[place], strengths[place] = places[target + 1], self._all.strengths[target // 2]
        return {
            "other": other,
            "strengths": strengths,
            "weights": np.where((targets >= 0) & (targets % 2 == 0), weights, 0),
        }

    def count(self, arrays):
        return arrays["weights"].sum()

    def loss(self, model, hidden, batch, arrays):
        scores = self.outputs(model, hidden, batch, arrays)
        difference = scores - jnp.take_along_axis(scores, arrays["other"], axis=1)
        each = preference_loss(difference, arrays["strengths"], self.config.loss)
        weights = arrays["weights"]

        def total(values):
            return jnp.where(weights > 0, weights * values, 0.0).sum()

        count = weights.sum()
        return total(each), {"accuracy": (total(difference > 0), count), "margin": (total(difference), count)}

    def outputs(self, model, hidden, batch, arrays):
        """Scores [B T]."""
        predicted = model.head(model.read(hidden, batch.until))
        return jnp.einsum("BTA,A->BT", predicted, self._weights, precision="highest")

    def evaluate(self, steps):
        from steerjax.report.preferences import preference_result

        data = self.data[VALIDATION]
        scores = np.zeros((len(data.strengths), 2))
        for example, score in self.read_ends(steps):
            scores[example.number // 2, example.number % 2] = score
        strengths = np.array(data.strengths)
        found = np.asarray(preference_loss(scores[:, 0] - scores[:, 1], strengths, self.config.loss), np.float64)
        result = preference_result(scores, strengths, data.lengths, data.ids)
        return Evaluation(float(found.mean()), result.metrics, result)

    def facts(self):
        rated = zip(self.setting.schema.names, self._weights, strict=True)
        return {"rated_attributes": [name for name, weight in rated if weight]}

    def summary(self):
        said = {}
        for split, data in self.data.items():
            words = (
                f"{len(data.strengths)} pairs",
                data.undecided and f"{data.undecided} undecided pairs are left out",
                data.single and f"{data.single} conversations without another response",
            )
            said[f"bradley_terry, {split}"] = "; ".join(filter(None, words))
        return said

    def report(self, evaluation, folder, records, summary, config_text):
        from steerjax.report.preferences import preference_text, write_preference_report

        if folder is not None:
            write_preference_report(folder, evaluation.detail, self.losses(records), summary, config_text)
        return preference_text(evaluation.detail)
