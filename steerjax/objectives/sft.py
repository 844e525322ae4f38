"""Attribute-conditioned SFT: a label line of ratings before each response; the response and its end are learnt.

Source: SteerLM, arXiv 2310.05344, step 3; NeMo `gpt_sft_chat_dataset.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic.dataclasses
from pydantic import Field

from steerjax.chat.render import TokenRole
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.packing import Layout
from steerjax.data.trees import Example
from steerjax.errors import ConfigError, DataError
from steerjax.objectives.cross_entropy import chunked_cross_entropy
from steerjax.objectives.objective import TRAIN, VALIDATION, Evaluation, Objective, Setting
from steerjax.schema import Schema, check_rating
from steerjax.typed import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class SFTConfig:
    """Attribute-conditioned SFT.

    Attributes:
        weight: of the objective among others.
        ratings: which ratings the label lines carry; `human_then_predicted` takes for each attribute the human one
            where there is one; `none` is plain SFT.
        missing: a response without ratings is trained without a label line (omit), is context only (leave_out), or
            stops the run (error).
        threads: a turn that several threads of a tree share is trained once, or once a thread (all, as the reference).
        default_ratings: what an exported model is asked for where a request names nothing; by name.
    """

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    ratings: Literal["human", "predicted", "human_then_predicted", "none"] = "human"
    missing: Literal["omit", "leave_out", "error"] = "omit"
    threads: Literal["once", "all"] = "once"
    default_ratings: Mapping[str, float] = field(default_factory=dict)

    def check(self, schema: Schema) -> None:
        """Raises ConfigError: a default rating of an unknown attribute, or outside its range."""
        for name, rating in self.default_ratings.items():
            try:
                check_rating(rating, schema[name])
            except DataError as error:
                raise ConfigError(f"config.sft.default_ratings: {error}") from None


class SFT(Objective):
    """A conversation through its last trained token is an example; what follows that has no part in the loss."""

    name, kind, Config = "sft", "chat", SFTConfig

    def __init__(self, config: SFTConfig, setting: Setting):
        super().__init__(config, setting)
        counts = {"conversations": 0, "responses": 0, "labelled": 0, "shared": 0, "tokens": 0, "untrained": 0}
        self.counts = {TRAIN: dict(counts), VALIDATION: dict(counts)}
        self._seen: dict[str, set[str]] = {TRAIN: set(), VALIDATION: set()}  # ids of turns that are trained

    def examples(self, conversation: Conversation, split: str) -> list[Example]:
        counts, seen = self.counts[split], self._seen[split]
        labels = [self._label(turn) for turn in conversation.turns]
        answers = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        unlabelled = {i for i in answers if not labels[i]} if self.config.ratings != "none" else set()
        if unlabelled and self.config.missing == "error":
            message = f"no rating (config.sft.ratings is '{self.config.ratings}')"
            cure = "rate it, or choose config.sft.missing 'omit' or 'leave_out'"
            raise DataError(message, field=f"turns[{min(unlabelled)}]", cure=cure)
        rendered = self.setting.renderer.render(conversation, labels)
        trained = np.isin(rendered.roles, (TokenRole.RESPONSE, TokenRole.END))
        trained[:1] = False  # nothing predicts it
        left_out = unlabelled if self.config.missing == "leave_out" else set()
        once = self.config.threads == "once"
        shared = {i for i in answers if once and conversation.turns[i].id and conversation.turns[i].id in seen}
        for span in rendered.responses:
            if span.turn in left_out | shared:
                trained[span.start : span.stop] = False
        self.setting.check_length(int(trained.nonzero()[0].max(initial=-1)) + 1)
        here = [i for i in answers if i not in left_out | shared]
        counts["responses"] += len(here)
        counts["labelled"] += sum(bool(labels[i]) for i in here)
        counts["shared"] += len(shared)
        if not trained.any():
            counts["untrained"] += 1
            return []
        seen.update(conversation.turns[i].id for i in here)
        return [self.example(split, rendered.tokens, rendered.root, trained)]

    def example(self, split: str, tokens: np.ndarray, root: int, trained: np.ndarray) -> Example:
        """Of a text, through the last of the tokens that are trained."""
        counts = self.counts[split]
        places = np.flatnonzero(trained).astype(np.int32)
        tokens = tokens[: places[-1] + 1]
        counts["conversations"] += 1
        counts["tokens"] += len(places)
        ones, number = np.ones(len(places), np.float32), counts["conversations"] - 1
        return Example(self.name, number, tokens, min(root, len(tokens)), places - 1, tokens[places], ones)

    def _label(self, turn: Turn) -> Mapping[str, float] | None:
        human, predicted = turn.ratings or {}, turn.predicted_ratings or {}
        choices = {"human": human, "predicted": predicted, "human_then_predicted": {**predicted, **human}, "none": {}}
        return choices[self.config.ratings] or None

    def check_data(self) -> None:
        for split, counts in self.counts.items():
            if not counts["conversations"]:
                cure = "conversations with an assistant turn, or config.sft.missing 'omit'"
                raise DataError(f"nothing to train for {split}: no response is left", cure=cure)
            if self.config.ratings != "none" and not counts["labelled"]:
                cure = "annotate them first, choose another config.sft.ratings, or 'none' for plain SFT"
                raise DataError(f"no response for {split} has {self.config.ratings} ratings: no label", cure=cure)

    def arrays(self, layout: Layout) -> dict[str, np.ndarray]:
        """targets: int32 [T], the next token; weights: float32 [T], 0 where it is not trained."""
        return {"targets": np.maximum(layout.targets[self.name], 0), "weights": layout.weights[self.name]}

    def count(self, arrays):
        return arrays["weights"].sum()

    def loss(self, model, hidden, batch, arrays):
        chunk = self.setting.loss_chunk
        total, count, right = chunked_cross_entropy(hidden, model.head, arrays["targets"], arrays["weights"], chunk)
        return total, {"accuracy": (right, count)}

    def outputs(self, model, hidden, batch, arrays):
        """Sums of loss, of tokens and of right tokens."""
        total, sums = self.loss(model, hidden, batch, arrays)
        return total, *reversed(sums["accuracy"])

    def evaluate(self, steps) -> Evaluation:
        total, count, right = np.sum([[float(x) for x in outputs] for _, outputs in steps], axis=0)
        return Evaluation(total / count, {"accuracy": right / count, "tokens": count})

    def facts(self) -> dict:
        return {"default_ratings": dict(self.config.default_ratings) or None}

    def summary(self) -> dict[str, str]:
        said = {}
        for split, counts in self.counts.items():
            words = [f"{counts['conversations']} conversations, {counts['tokens']:,} trained tokens"]
            words += [
                f"{counts['labelled'] / max(1, counts['responses']):.0%} of {counts['responses']} responses labelled"
            ]
            words += [f"{counts['shared']} turns of several threads trained once"] if counts["shared"] else []
            words += [f"{counts['untrained']} conversations with nothing to train"] if counts["untrained"] else []
            said[f"sft, {split}"] = "; ".join(words)
        return said

    def report(self, evaluation: Evaluation, folder: Path | None, records, summary, config_text: str) -> str:
        values = {"loss (nats a token)": evaluation.loss, "perplexity": float(np.exp(evaluation.loss)),
                  "accuracy of the next token": evaluation.values["accuracy"]}  # fmt: skip
        table = "\n".join(f"{name:>28}  {value:.4f}" for name, value in values.items())
        text = f"validation, {int(evaluation.values['tokens']):,} response tokens\n{table}"
        if folder is not None:
            from steerjax.report.plots import plot_losses

            folder.mkdir(parents=True, exist_ok=True)
            plot_losses(records, folder / "loss.png")
            facts = "\n".join(f"{name:>28}  {value}" for name, value in summary.items())
            page = f"# SFT\n\n```\n{facts}\n\n{text}\n```\n\n![loss](loss.png)\n\n```json\n{config_text}```\n"
            (folder / "report.md").write_text(page, encoding="utf-8")
        return text
