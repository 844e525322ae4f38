"""Conversations as examples of attribute-conditioned SFT: tokens, and which of them are trained.

A label line stands before each response, and the response and its end are trained. Source: SteerLM, arXiv 2310.05344,
step 3; NeMo `gpt_sft_chat_dataset.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steerjax.chat.render import Renderer, TokenRole
from steerjax.data.conversation import Conversation, Turn
from steerjax.data.packing import Branch, PromptGroup, Row
from steerjax.errors import ConfigError, DataError

RATINGS = ("human", "predicted", "human_then_predicted", "none")
MISSING = ("omit", "leave_out", "error")
AVERAGES = ("tokens", "examples")


@dataclass(frozen=True, eq=False)
class SFTExample:
    """A conversation through its last trained token; what follows that has no part in the loss.

    Attributes:
        tokens: int32 [P].
        trained: bool [P], where the token is a target; never the first.
        id, file, line: of the conversation.
    """

    tokens: np.ndarray
    trained: np.ndarray
    id: str
    file: str
    line: int


def sft_example(
    conversation: Conversation, renderer: Renderer, *, ratings: str, missing: str, row_length: int
) -> SFTExample:
    """The conversation with a label line before each response, from the ratings that its turn has.

    Args:
        ratings: which ratings are written: "human"; "predicted", rounded; "human_then_predicted", for each attribute
            the human one where there is one, else the predicted; "none", no label line at all.
        missing: what becomes of an assistant turn without any such rating: "omit" trains it without a label line,
            "leave_out" lets it stand without a label line and does not train it, "error" refuses the conversation.
        row_length: tokens.

    Raises:
        DataError: a rating is missing ("error"), nothing is trained, more than `row_length` tokens, or a text that the
            renderer refuses. Names file and line.
        ConfigError: another value of `ratings` or `missing`.
    """
    _check_option("ratings", ratings, RATINGS)
    _check_option("missing", missing, MISSING)

    def refused(message: str, cure: str, field: str = "") -> DataError:
        return DataError(message, file=conversation.file, line=conversation.line, field=field, cure=cure)

    labels = [_label(turn, ratings) for turn in conversation.turns]
    answers = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    unrated = {i for i in answers if not labels[i]} if ratings != "none" else set()
    if unrated and missing == "error":
        cure = "rate it, or choose missing='omit' or 'leave_out'"
        raise refused(f"no rating (ratings='{ratings}')", cure, f"turns[{min(unrated)}]")
    rendered = renderer.render(conversation, labels)
    trained = np.isin(rendered.roles, (TokenRole.RESPONSE, TokenRole.END))
    trained[:1] = False  # nothing predicts it
    if missing == "leave_out":
        for span in rendered.responses:
            trained[span.start : span.stop] &= span.turn not in unrated
    if not trained.any():
        what = "all assistant turns are unrated and left out" if answers else "there is no assistant turn"
        raise refused(f"nothing to train: {what}", "remove the row, or set config.data.on_bad_row='skip'")
    length = int(np.flatnonzero(trained)[-1]) + 1
    if length > row_length:
        cure = "raise config.batch.row_length, or set config.data.on_bad_row='skip' to leave such rows out"
        raise refused(f"{length} tokens do not fit a row of {row_length}", cure)
    place = conversation.id, conversation.file, conversation.line
    return SFTExample(rendered.tokens[:length], trained[:length], *place)


def _check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError for a value that is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}: unknown value '{value}'; use one of: {', '.join(allowed)}")


def _label(turn: Turn, ratings: str) -> Mapping[str, float] | None:
    human, predicted = turn.ratings or {}, turn.predicted_ratings or {}
    choices = {"human": human, "predicted": predicted, "human_then_predicted": {**predicted, **human}, "none": {}}
    return choices[ratings] or None


class SFTBatch(NamedTuple):
    """Packed conversations as arrays: B rows, T tokens. Without B for one row.

    Attributes:
        tokens: int32 [B, T], 0 in the padding.
        positions: int32 [B, T], from 0 in each conversation.
        segments: int32 [B, T], which conversation, from 1; 0 is padding.
        targets: int32 [B, T], the next token of the same conversation, else 0.
        weights: float32 [B, T], of the targets; 0 where the target is not trained.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def sft_row_arrays(examples: Sequence[SFTExample], row: Row, row_length: int, average: str = "tokens") -> SFTBatch:
    """One row of a batch.

    Args:
        row: its segments' groups are indices into `examples`.
        average: "tokens", every trained token weighs 1; "examples", every conversation weighs 1, which is what the
            reference computes with micro-batch 1.
    """
    _check_option("average", average, AVERAGES)
    out = SFTBatch(*(np.zeros(row_length, np.int32) for _ in range(4)), weights=np.zeros(row_length, np.float32))
    start = 0
    for number, segment in enumerate(row, start=1):
        example = examples[segment.group]
        span = slice(start, start + len(example.tokens))
        out.tokens[span] = example.tokens
        out.positions[span] = np.arange(len(example.tokens))
        out.segments[span] = number
        before = slice(span.start, span.stop - 1)  # tokens that have a next one
        out.targets[before] = example.tokens[1:]
        out.weights[before] = example.trained[1:] / (example.trained.sum() if average == "examples" else 1)
        start = span.stop
    return out


def sft_groups(examples: Sequence[SFTExample]) -> tuple[PromptGroup, ...]:
    """Each conversation as a prompt with one branch without tokens, so that `packing.pack` packs them whole."""
    none = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, bool)
    return tuple(
        PromptGroup(example.tokens, (Branch(*none, example=i, at=len(example.tokens)),))
        for i, example in enumerate(examples)
    )
