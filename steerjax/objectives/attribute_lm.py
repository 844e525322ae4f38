"""The attribute model as a language model: behind a rated response the label line of its ratings is learnt.

Source: SteerLM, arXiv 2310.05344, step 1; NeMo `gpt_sft_chat_dataset.py`, TEXT_TO_VALUE.
"""

import pydantic.dataclasses

from steerjax.objectives.next_token import NextToken
from steerjax.objectives.objective import TRAIN, VALIDATION, ObjectiveConfig
from steerjax.objectives.rated_turns import RatedTurns
from steerjax.schema import Schema
from steerjax.typed import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class AttributeLMConfig(ObjectiveConfig):
    """A rated response is followed by a label line of its ratings, whole numbers, and that line is learnt; `annotate`
    reads expected ratings off the tokens' probabilities."""

    def check(self, schema: Schema) -> None:
        """Nothing here depends on the schema."""


class AttributeLM(RatedTurns, NextToken):
    """An example is a conversation through a rated turn and its label line, whose tokens and end are learnt."""

    name, kind, Config = "attribute_lm", "chat", AttributeLMConfig
    title, learnt, prefix = "The attribute model", "tokens of label lines", "label_"

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.tokens = {TRAIN: 0, VALIDATION: 0}

    def render(self, conversation, turn):
        tokens, *more = self.setting.renderer.rating_tokens(conversation, turn, conversation.turns[turn].ratings)
        return tokens, more

    def example(self, split, tokens, more, ratings):
        (root, places), (number, _) = more, self.keep(split, ratings)
        self.tokens[split] += len(places)
        return self.next_tokens(number, tokens, root, places)

    def summary(self):
        return {
            key: f"{said}; {count:,} trained tokens"
            for (key, said), count in zip(super().summary().items(), self.tokens.values(), strict=True)
        }
