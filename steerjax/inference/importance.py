"""Log-likelihoods of the answers to each prompt under a chat model: log Q'(y|a,x) and log P(y|x) of SteerLM 2.0.

Source: HelpSteer2, arXiv 2406.08673, section 4.5. An answer is rendered as training renders it, its end included.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steerjax.bundle import Bundle
from steerjax.chat.render import Label, Renderer
from steerjax.data.conversation import Conversation
from steerjax.data.trees import Example
from steerjax.errors import DataError
from steerjax.inference.job import progress, resumable
from steerjax.inference.likelihood import LikelihoodScorer

_CHUNK = 16  # groups that are packed together, and lost when interrupted, for each row of a step


@dataclass(frozen=True)
class Group:
    """A prompt x, the ratings a that a model was asked for, and its answers y."""

    prompt: Conversation  # ends with the user's turn
    asked: Mapping[str, float]
    answers: tuple[str, ...]


@dataclass
class Scores:
    """Of the answers of a group.

    Attributes:
        id: the prompt's.
        prompt: tokens through the label line.
        answers: tokens of each answer and its end.
        log_likelihoods: nats, of these; None where an answer does not fit the model or a row.
    """

    id: str
    prompt: int = 0
    answers: list[int] = field(default_factory=list)
    log_likelihoods: list[float | None] = field(default_factory=list)


def answer_example(renderer: Renderer, prompt: Conversation, label: Label | None, answer: str) -> Example:
    """What asks for log P(answer and its end | prompt and label line). Raises DataError as the renderer."""
    tokens, _, start = renderer.response_tokens(prompt, answer, label)
    places = np.arange(start - 1, len(tokens) - 1, dtype=np.int32)
    return Example("answer", 0, tokens, start, places, tokens[places + 1], np.ones(len(places), np.float32))


def score_groups(
    path: Path, groups: Sequence[Group], bundle: Bundle, settings: Mapping[str, Any], *, labelled: bool, row_length: int
) -> None:
    """Writes `Scores` of each group, a line each, with the ratings that were asked for in the label line, or without a
    label line. Goes on where an earlier run of the same `settings` was.

    Raises DataError: a prompt that the model's template cannot write, or an output of other settings.
    """
    scorer, renderer = LikelihoodScorer(bundle, row_length=row_length), bundle.renderer()
    chunk = _CHUNK * scorer.rows
    job = {**settings, "labelled": labelled, "row_length": scorer.row_length, "rows": scorer.rows}
    with resumable(path, job) as output, progress(len(groups), output.done, "prompt") as bar:
        for first in range(output.done // chunk * chunk, 0 if output.finished else len(groups), chunk):
            output.add(first, _scored(groups[first : first + chunk], scorer, renderer, labelled))
            bar.update(output.done - bar.n)


def read_scores(path: Path) -> list[Scores]:
    """What `score_groups` has written."""
    return [Scores(**json.loads(line)) for line in path.read_bytes().splitlines()]


def _scored(groups: Sequence[Group], scorer: LikelihoodScorer, renderer: Renderer, labelled: bool) -> list[dict]:
    scores, examples, places = [Scores(group.prompt.id) for group in groups], [], []
    for one, group in zip(scores, groups, strict=True):
        for number, answer in enumerate(group.answers):
            example = answer_example(renderer, group.prompt, group.asked if labelled else None, answer)
            one.prompt = example.root
            one.answers.append(len(example.targets))
            one.log_likelihoods.append(None)
            try:
                examples.append(scorer.check(example))
                places.append((one, number))
            except DataError:  # too long
                pass
    for (one, number), value in zip(places, scorer(examples).log_likelihoods, strict=True):
        one.log_likelihoods[number] = float(value)
    return [asdict(one) for one in scores]
