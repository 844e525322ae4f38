"""Attribute-conditioned SFT: a label line of ratings before each response; the response and its end are learnt.

Source: SteerLM, arXiv 2310.05344, step 3; NeMo `gpt_sft_chat_dataset.py`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pydantic.dataclasses

from steerjax.chat.render import TokenRole
from steerjax.data.conversation import Turn
from steerjax.data.trees import Example
from steerjax.errors import DataError
from steerjax.objectives.next_token import NextToken
from steerjax.objectives.objective import TRAIN, VALIDATION, SteeredConfig
from steerjax.typed import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class SFTConfig(SteeredConfig):
    """Fine-tuning on responses, each after a label line of its ratings.

    Attributes:
        ratings: which ratings the label lines carry; `human_then_predicted` takes for each attribute the human one
            where there is one; `none` is plain SFT.
        missing: a response without ratings is trained without a label line (omit), is context only (leave_out), or
            stops the run (error).
        threads: a turn that several threads of a tree share is trained once, or in each (all, as in NeMo-Aligner).
    """

    group = "sft"
    ratings: Literal["human", "predicted", "human_then_predicted", "none"] = "human"
    missing: Literal["omit", "leave_out", "error"] = "omit"
    threads: Literal["once", "all"] = "once"


class SFT(NextToken):
    """A conversation through its last trained token is an example; what follows that has no part in the loss."""

    name, kind, Config = "sft", "chat", SFTConfig
    title, learnt = "SFT", "response tokens"

    def __init__(self, config, setting):
        super().__init__(config, setting)
        self.counts: dict[str, Counter] = {TRAIN: Counter(), VALIDATION: Counter()}
        self._seen: dict[str, set[tuple[str, int]]] = {TRAIN: set(), VALIDATION: set()}  # messages that are trained

    def examples(self, conversation, split):
        counts, seen, turns, config = self.counts[split], self._seen[split], conversation.turns, self.config
        labels, messages = [self._label(turn) for turn in turns], conversation.messages()
        answers = {i for i, turn in enumerate(turns) if turn.role == "assistant"}
        unlabelled = {i for i in answers if not labels[i] and config.ratings != "none"}
        if unlabelled and config.missing == "error":
            message = f"no rating (config.sft.ratings is '{config.ratings}')"
            cure = "rate it, or choose config.sft.missing 'omit' or 'leave_out'"
            raise DataError(message, field=f"turns[{min(unlabelled)}]", cure=cure)
        shared = {i for i in answers if messages[i] in seen and config.threads == "once"}
        learnt = answers - shared - (unlabelled if config.missing == "leave_out" else set())
        rendered = self.setting.renderer.render(conversation, labels)
        trained = np.isin(rendered.roles, (TokenRole.RESPONSE, TokenRole.END))
        trained[:1] = False  # nothing predicts it
        for span in rendered.responses:
            if span.turn not in learnt:
                trained[span.start : span.stop] = False
        self.setting.check_length(int(trained.nonzero()[0].max(initial=-1)) + 1)
        counts.update(
            responses=len(learnt), labelled=sum(bool(labels[i]) for i in learnt), shared=len(shared),
            untrained=int(not trained.any()),
        )  # fmt: skip
        seen |= {messages[i] for i in learnt} - {None}
        return [self.example(split, rendered.tokens, rendered.root, trained)] if trained.any() else []

    def example(self, split: str, tokens: np.ndarray, root: int, trained: np.ndarray) -> Example:
        """Of a text, through the last of the tokens that are trained."""
        counts, places = self.counts[split], np.flatnonzero(trained)
        counts.update(conversations=1, tokens=len(places))
        return self.next_tokens(counts["conversations"] - 1, tokens, root, places)

    def _label(self, turn: Turn) -> Mapping[str, float] | None:
        human, predicted = turn.ratings or {}, turn.predicted_ratings or {}
        choices = {"human": human, "predicted": predicted, "human_then_predicted": {**predicted, **human}, "none": {}}
        return choices[self.config.ratings] or None

    def check_data(self):
        for split, counts in self.counts.items():
            if not counts["conversations"]:
                cure = "conversations with an assistant turn; where rows are too long, a larger config.batch.row_length"
                cure += "; where ratings are missing, config.sft.missing 'omit'"
                raise DataError(f"nothing to train for {split}: no response is left", cure=cure)
            if self.config.ratings != "none" and not counts["labelled"]:
                cure = "annotate them first, choose another config.sft.ratings, or 'none' for plain SFT"
                raise DataError(f"no response for {split} has {self.config.ratings} ratings: no label", cure=cure)

    def facts(self):
        return self.config.facts()

    def summary(self):
        said = {}
        for split, n in self.counts.items():
            words = (
                f"{n['conversations']} conversations, {n['tokens']:,} trained tokens",
                f"{n['labelled'] / max(1, n['responses']):.0%} of {n['responses']} responses labelled",
                n["shared"] and f"{n['shared']} turns of several threads trained once",
                n["untrained"] and f"{n['untrained']} conversations with nothing to train",
            )
            said[f"sft, {split}"] = "; ".join(filter(None, words))
        return said
