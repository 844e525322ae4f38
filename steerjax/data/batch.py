"""The batch at step s as a pure function of (data, seed, s)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steerjax.data.packing import PromptGroup, Row, epoch_rows


class Batch(NamedTuple):
    """Packed rows as arrays: B rows, T tokens, R responses a row, A attributes. A padding row has no segments.

    Attributes:
        tokens: int32 [B, T], 0 in the padding.
        positions: int32 [B, T], 0, 1, ... in a prompt; each response goes on from where it leaves its prompt.
        segments: int32 [B, T], which prompt group, from 1; 0 is padding.
        branches: int32 [B, T], 0 in a prompt, from 1 in its responses.
        ends: int32 [B, R], place of each response's last token.
        examples: int32 [B, R], number of the example; -1 where there is no response.
        ratings: float32 [B, R, A].
        mask: bool [B, R, A], where a rating is present.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    branches: np.ndarray
    ends: np.ndarray
    examples: np.ndarray
    ratings: np.ndarray
    mask: np.ndarray


def row_arrays(groups: Sequence[PromptGroup], row: Row, row_length: int, responses_per_row: int) -> Batch:
    """One row of a batch, without the leading B."""
    attributes = len(groups[0].branches[0].ratings)
    T, R = row_length, responses_per_row
    out = Batch(
        *(np.zeros(T, np.int32) for _ in range(4)),
        ends=np.zeros(R, np.int32),
        examples=np.full(R, -1, np.int32),
        ratings=np.zeros((R, attributes), np.float32),
        mask=np.zeros((R, attributes), bool),
    )
    place, response = 0, 0

    def write(tokens: np.ndarray, position: int, segment: int, branch: int) -> int:
        span = slice(place, place + len(tokens))
        out.tokens[span] = tokens
        out.positions[span] = np.arange(position, position + len(tokens))
        out.segments[span] = segment
        out.branches[span] = branch
        return span.stop

    for number, segment in enumerate(row, start=1):
        group, seen = groups[segment.group], 0
        for b, index in enumerate(segment.branches, start=1):
            branch = group.branches[index]
            place = write(group.prompt[seen : branch.at], seen, number, 0)
            place = write(branch.tokens, branch.at, number, b)
            seen = branch.at
            out.ends[response] = place - 1
            out.examples[response] = branch.example
            out.ratings[response] = branch.ratings
            out.mask[response] = branch.mask
            response += 1
        place = write(group.prompt[seen:], seen, number, 0)
    return out


@dataclass(frozen=True, eq=False)  # eq=False: a plan is hashed by identity, arrays have no hash
class BatchPlan:
    """Which rows a step trains; a pure function of its fields and the step.

    Rows of one epoch follow those of the one before without a gap; a step may hold the last rows of one epoch and
    the first of the next. So every example is trained once an epoch and none is dropped.

    Attributes:
        rows: a step.
    """

    groups: tuple[PromptGroup, ...]
    rows: int
    row_length: int
    responses_per_row: int
    seed: int

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as its run
    def epoch(self, epoch: int) -> list[Row]:
        """The rows of an epoch, in order."""
        return epoch_rows(self.groups, self.row_length, self.responses_per_row, self.seed, epoch)

    @functools.cache  # noqa: B019
    def epoch_start(self, epoch: int) -> int:
        """Rows before an epoch; epochs may differ by a row or two."""
        return self.epoch_start(epoch - 1) + len(self.epoch(epoch - 1)) if epoch else 0

    def step_rows(self, step: int) -> list[Row]:
        """The rows of a step."""
        first, epoch = step * self.rows, 0
        while self.epoch_start(epoch + 1) <= first:
            epoch += 1
        first -= self.epoch_start(epoch)
        rows: list[Row] = []
        while len(rows) < self.rows:
            rows += self.epoch(epoch)[first : first + self.rows - len(rows)]
            first, epoch = 0, epoch + 1
        return rows

    def steps(self, epochs: float) -> int:
        """Steps until so many epochs of rows have been seen."""
        part = (epochs % 1) * len(self.epoch(int(epochs))) if epochs % 1 else 0
        return max(1, math.ceil((self.epoch_start(int(epochs)) + part) / self.rows))


def evaluation_steps(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows in steps of `size`; the last is filled up with padding rows, so that one shape is compiled."""
    steps = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [[*step, *[()] * (size - len(step))] for step in steps]
