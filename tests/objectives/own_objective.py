"""An objective of a user's own, in one file: the length of a rated response, in tokens, as one more output to learn.

It is registered in `test_own_objective.py` and trained with the command's own function.
"""

import jax.numpy as jnp
import numpy as np
import pydantic.dataclasses

from steerjax.data.trees import Example
from steerjax.objectives import Evaluation, Objective, ObjectiveConfig


@pydantic.dataclasses.dataclass(frozen=True)
class Config(ObjectiveConfig):
    scale: float = 0.01

    def check(self, schema) -> None:
        pass


class Length(Objective):
    """The first output where an answer ends is scale * tokens of the example."""

    name, kind, Config = "length", "reward", Config

    def examples(self, conversation, split):
        found = []
        for index, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                tokens, root = self.setting.renderer.reward_tokens(conversation, index)
                end, target = np.array([[len(tokens) - 1], [len(tokens)]], np.int32)
                found.append(Example(self.name, 0, tokens, root, end, target, np.ones(1, np.float32)))
        return found

    def arrays(self, layout):
        return {"target": layout.targets[self.name], "weight": layout.weights[self.name]}

    def count(self, arrays):
        return arrays["weight"].sum()

    def loss(self, model, hidden, batch, arrays):
        predicted = model.head(model.read(hidden, batch.until))[..., 0]
        errors = arrays["weight"] * jnp.abs(predicted - self.config.scale * arrays["target"])
        return errors.sum(), {}

    def outputs(self, model, hidden, batch, arrays):
        return self.loss(model, hidden, batch, arrays)[0], self.count(arrays)

    def evaluate(self, steps):
        total, count = np.sum([outputs for _, outputs in steps], axis=0)
        return Evaluation(float(total / count), {"length_error": float(total / count)})

    def report(self, evaluation, folder, records, summary, config_text):
        return f"length: {evaluation.loss:.3f}"
