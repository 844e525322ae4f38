"""Rated answers -> the groups that SteerLM 2.0 is trained on, with what was left out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from steerjax.beta_bins import Edges, log_probabilities
from steerjax.data.conversation import Conversation, Sample
from steerjax.data.loading import Skipped
from steerjax.evaluation.steering_answers import SteeredAnswer, read_answers
from steerjax.inference.importance import Group, Scores
from steerjax.objectives.steerlm2 import log_targets
from steerjax.schema import Schema

# Why an answer has no weight.
CUT = "cut at the limit of tokens, so without an end"
UNRATED = "without a predicted rating (rated.jsonl.skipped.jsonl says why)"
LONG = "too long for a row or a model"
ALONE = "without another answer to compare it with"
TOGETHER = "too long for a row with the prompt's other answers (config.batch.row_length)"


@dataclass(frozen=True)
class RatedGroup:
    """The answers to a prompt that can be weighed, where each stands in its file, and their predicted ratings [E A]."""

    group: Group
    lines: tuple[int, ...]
    predicted: np.ndarray

    def skipped(self, number: int, reason: str) -> Skipped:
        return Skipped(self.group.prompt.file, self.lines[number], reason)


def rated_groups(path: Path, schema: Schema) -> tuple[list[RatedGroup], list[Skipped]]:
    """Of what `generate` and then `annotate` wrote: the answers to each prompt, and those that have no weight."""
    rated, skipped = [], []
    for _, answers in groupby(read_answers(str(path)), _prompt):
        usable = []
        for answer in answers:
            reason = CUT if answer.cut else "" if answer.predicted.keys() >= set(schema.names) else UNRATED
            if reason:
                skipped.append(Skipped(answer.conversation.file, answer.conversation.line, reason))
            else:
                usable.append(answer)
        if usable:
            first = usable[0].conversation
            prompt = replace(first, turns=first.turns[:-1], id=first.id.rpartition("/")[0])
            group = Group(prompt, usable[0].requested, tuple(answer.text for answer in usable))
            predicted = np.array([[answer.predicted[name] for name in schema.names] for answer in usable])
            rated.append(RatedGroup(group, tuple(answer.conversation.line for answer in usable), predicted))
    return rated, skipped


def weighed_groups(
    rated: Sequence[RatedGroup], log_sampled: Sequence[Scores], log_prior: Sequence[Scores], schema: Schema,
    edges: Edges, row_length: int,
) -> tuple[list[Conversation], list[Skipped]]:  # fmt: skip
    """The groups with the log-probabilities of their samples, and the answers that were left out: those without a
    log-probability, those to a prompt with fewer than two different ones, whose weights are what they are to be, and
    those that no row of the training holds together."""
    groups, skipped = [], []
    for one, sampled, prior in zip(rated, log_sampled, log_prior, strict=True):
        wanted = log_probabilities(one.predicted, schema, one.group.asked, edges)
        logs = zip(one.group.answers, wanted, prior.log_likelihoods, sampled.log_likelihoods, strict=True)
        found = {i: Sample(text, float(a), p, q) for i, (text, a, p, q) in enumerate(logs) if None not in (p, q)}
        skipped += [one.skipped(i, LONG) for i in range(len(one.lines)) if i not in found]
        reason = ""
        if len({sample.content for sample in found.values()}) < 2:
            reason = ALONE
        elif sampled.prompt - 1 + sum(sampled.answers[i] for i in found) > row_length:
            reason = TOGETHER
        if reason:
            skipped += [one.skipped(i, reason) for i in found]
        else:
            groups.append(replace(one.group.prompt, asked=one.group.asked, samples=tuple(found.values())))
    return groups, skipped


def weights(group: Conversation) -> np.ndarray:
    """w' [E]: what the group's samples should weigh, adding up to 1."""
    logs = ([getattr(s, key) for s in group.samples] for key in ("log_rating", "log_prior", "log_sampled"))
    return np.exp(log_targets(*map(np.array, logs)))


def effective_samples(group: Conversation) -> float:
    """1 / sum w'^2: how many samples of equal weight say as much."""
    return float(1 / np.square(weights(group)).sum())


def _prompt(answer: SteeredAnswer) -> tuple:
    return answer.conversation.id.rpartition("/")[0], answer.prompt
