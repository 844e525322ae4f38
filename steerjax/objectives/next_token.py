"""What objectives have in common that learn the next token of a text at some of its places."""

from typing import ClassVar

import numpy as np

from steerjax.data.trees import Example
from steerjax.objectives.cross_entropy import chunked_cross_entropy
from steerjax.objectives.objective import Evaluation, Objective
from steerjax.report.losses import LossPage


class NextToken(Objective):
    """The loss is the cross-entropy of the tokens that are learnt, each counting alike.

    Attributes:
        title: of the report.
        learnt: what is learnt, in the report's words.
        prefix: of the metrics' names, so that two such objectives of a run have their own.
    """

    title: ClassVar[str]
    learnt: ClassVar[str]
    prefix: ClassVar[str] = ""

    def next_tokens(self, number: int, tokens: np.ndarray, root: int, places: np.ndarray) -> Example:
        """Of a text, through the last of the places (int [n], ascending, from 1) whose tokens are learnt."""
        tokens, places = tokens[: places[-1] + 1], places.astype(np.int32)
        ones = np.ones(len(places), np.float32)
        return Example(self.name, number, tokens, min(root, len(tokens)), places - 1, tokens[places], ones)

    def arrays(self, layout):
        """targets: int32 [T], the next token; weights: float32 [T], 0 where it is not trained."""
        return {"targets": np.maximum(layout.targets[self.name], 0), "weights": layout.weights[self.name]}

    def count(self, arrays):
        return arrays["weights"].sum()

    def loss(self, model, hidden, batch, arrays):
        chunk = self.setting.loss_chunk
        total, count, right = chunked_cross_entropy(hidden, model.head, arrays["targets"], arrays["weights"], chunk)
        return total, {f"{self.prefix}accuracy": (right, count)}

    def outputs(self, model, hidden, batch, arrays):
        """Sums of loss, of tokens and of right tokens."""
        total, sums = self.loss(model, hidden, batch, arrays)
        return total, *reversed(sums[f"{self.prefix}accuracy"])

    def evaluate(self, steps):
        total, count, right = np.sum([[float(x) for x in outputs] for _, outputs in steps], axis=0)
        return Evaluation(total / count, {f"{self.prefix}accuracy": right / count, f"{self.prefix}tokens": count})

    def report(self, evaluation, folder, records, summary, config_text):
        values = {"loss (nats a token)": evaluation.loss, "perplexity": float(np.exp(evaluation.loss)),
                  "accuracy of the next token": evaluation.values[f"{self.prefix}accuracy"]}  # fmt: skip
        counted = f"validation, {int(evaluation.values[f'{self.prefix}tokens']):,} {self.learnt}"
        page = LossPage(f"{self.title} on the validation split", counted, values, self.losses(records), "nats a token")
        return page.write(folder, summary, config_text)
