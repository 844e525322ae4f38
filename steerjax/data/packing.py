"""Prompt groups -> packed rows, a prompt written once for all its responses.

A *segment* is a prompt with some of its responses (*branches*); a row holds segments one after the other. A branch
stands after the part of the prompt that it sees: of a conversation with several rated turns, the prompt of the last
turn holds all earlier turns, and their branches hold only what differs from it, often nothing. The packing plan of an
epoch is a pure function of (lengths, row length, seed, epoch).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerjax.errors import DataError


@dataclass(frozen=True)
class Branch:
    """One response whose reward is read at its last token.

    Attributes:
        tokens: int32 [T], what follows the prompt's first `at` tokens; without any, the reward is read in the prompt.
        ratings: float32 [A], 0 where missing.
        mask: bool [A], where a rating is present.
        example: number of the example in its split, from 0.
        at: how many tokens of the prompt it sees.
    """

    tokens: np.ndarray
    ratings: np.ndarray
    mask: np.ndarray
    example: int
    at: int


@dataclass(frozen=True)
class PromptGroup:
    """A prompt (int32 [P]) and the responses that share it, in the order of `at`, those without tokens first."""

    prompt: np.ndarray
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Segment:
    """What of a group stands together in a row: indices into the groups and into the group's branches."""

    group: int
    branches: tuple[int, ...]
    length: int  # tokens


Row = tuple[Segment, ...]


def check_fits(prompt_tokens: int, response_tokens: int, row_length: int) -> None:
    """Raises DataError when an example is too long for a row of its own. Nothing is ever cut."""
    if prompt_tokens + response_tokens > row_length:
        raise DataError(
            f"{prompt_tokens} prompt and {response_tokens} response tokens do not fit a row of {row_length}",
            cure="raise config.batch.row_length, or set config.data.on_bad_row='skip' to leave such rows out",
        )


def share_prompts(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    ratings: np.ndarray,
    mask: np.ndarray,
    row_length: int,
) -> tuple[PromptGroup, ...]:
    """Groups examples so that what their tokens have in common is written once.

    Examples with the same prompt share it; one whose prompt is the beginning of a longer prompt becomes a branch of
    that, if both fit a row. Exact for a causal model, whatever the tokens.

    Args:
        prompts, responses: int32 tokens of each of the E examples.
        ratings, mask: [E, A].
    """
    members: dict[bytes, list[int]] = {}
    for example, prompt in enumerate(prompts):
        members.setdefault(prompt.astype(np.int32).tobytes(), []).append(example)
    ordered = sorted(members)  # a prompt stands right before those that begin with it
    trunks = list(ordered)
    for i in range(len(ordered) - 2, -1, -1):
        if ordered[i + 1].startswith(ordered[i]):
            trunks[i] = trunks[i + 1]
    trunk_of = dict(zip(ordered, trunks, strict=True))
    branches: dict[bytes, list[Branch]] = {}
    for own, examples in members.items():
        for e in examples:
            key, at, tokens = own, len(prompts[e]), responses[e]
            if trunk_of[own] != own:
                trunk = np.frombuffer(trunk_of[own], np.int32)
                shared = _common_prefix(np.concatenate([prompts[e], responses[e]]), trunk)
                own_tokens = responses[e][shared - len(prompts[e]) :]
                if len(trunk) + len(own_tokens) <= row_length:
                    key, at, tokens = trunk_of[own], shared, own_tokens
            branches.setdefault(key, []).append(Branch(tokens, ratings[e], mask[e], e, at))
    return tuple(
        PromptGroup(np.frombuffer(key, np.int32), tuple(sorted(group, key=lambda b: (b.at, len(b.tokens) > 0))))
        for key, group in branches.items()
    )


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def split_group(index: int, group: PromptGroup, row_length: int, most: int) -> list[Segment]:
    """Cuts a group into as few segments as first-fit-decreasing finds; each writes the prompt again."""
    room = row_length - len(group.prompt)
    lengths = [len(branch.tokens) for branch in group.branches]
    bins: list[tuple[int, list[int]]] = []  # (tokens, branches)
    for branch in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        for i, (used, members) in enumerate(bins):
            if used + lengths[branch] <= room and len(members) < most:
                bins[i] = (used + lengths[branch], [*members, branch])
                break
        else:
            bins.append((lengths[branch], [branch]))
    return [Segment(index, tuple(sorted(members)), len(group.prompt) + used) for used, members in bins]


def pack(groups: Sequence[PromptGroup], row_length: int, responses_per_row: int, order: Sequence[int]) -> list[Row]:
    """Best-fit-decreasing: the longest segment first, each into the fullest row that still has room.

    Args:
        row_length: tokens.
        responses_per_row: most branches in a row.
        order: of the groups; decides among segments of one length.
    """
    segments = [s for i in order for s in split_group(i, groups[i], row_length, responses_per_row)]
    return pack_segments(segments, row_length, responses_per_row)


def pack_segments(segments: Sequence[Segment], row_length: int, responses_per_row: int) -> list[Row]:
    """`pack` of segments; their order decides among those of one length."""
    rows: list[tuple[list[Segment], int]] = []  # (segments, branches)
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for segment in sorted(segments, key=lambda s: -s.length):
        place = bisect.bisect_left(room, (segment.length, -1))
        while place < len(room) and rows[room[place][1]][1] + len(segment.branches) > responses_per_row:
            place += 1
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = row_length, len(rows)
            rows.append(([], 0))
        members, branches = rows[row]
        rows[row] = ([*members, segment], branches + len(segment.branches))
        bisect.insort(room, (left - segment.length, row))
    return [tuple(members) for members, _ in rows]


def epoch_rows(
    groups: Sequence[PromptGroup], row_length: int, responses_per_row: int, seed: int, epoch: int
) -> list[Row]:
    """The rows of an epoch in the order in which they are trained: a pure function of (data, seed, epoch)."""
    random = np.random.default_rng((seed, epoch))
    rows = pack(groups, row_length, responses_per_row, random.permutation(len(groups)).tolist())
    return [rows[i] for i in random.permutation(len(rows))]


def unpacked_rows(groups: Sequence[PromptGroup]) -> list[Row]:
    """One row for each response, in order: what packing must equal."""
    return [
        (Segment(g, (b,), len(group.prompt) + len(branch.tokens)),)
        for g, group in enumerate(groups)
        for b, branch in enumerate(group.branches)
    ]


@dataclass(frozen=True)
class PackingStatistics:
    """Counts over the rows of an epoch. `unshared_tokens`: with the prompt written before every response."""

    rows: int
    row_length: int
    tokens: int
    unshared_tokens: int
    examples: int
    attention_pairs: int  # (query, key) pairs that the mask allows

    @property
    def fill(self) -> float:
        return self.tokens / (self.rows * self.row_length)

    @property
    def saving(self) -> float:
        """How many times fewer tokens than with every prompt written before every response."""
        return self.unshared_tokens / self.tokens


def row_pairs(groups: Sequence[PromptGroup], row: Row) -> int:
    """(query, key) pairs that the mask allows in a row; what attention costs."""
    pairs = 0
    for segment in row:
        prompt = len(groups[segment.group].prompt)
        pairs += prompt * (prompt + 1) // 2
        for b in segment.branches:
            branch = groups[segment.group].branches[b]
            response = len(branch.tokens)
            pairs += response * branch.at + response * (response + 1) // 2
    return pairs


def packing_statistics(groups: Sequence[PromptGroup], rows: Sequence[Row], row_length: int) -> PackingStatistics:
    """Counts tokens, examples and attention pairs of packed rows."""
    branches = [groups[s.group].branches[b] for r in rows for s in r for b in s.branches]
    return PackingStatistics(
        rows=len(rows),
        row_length=row_length,
        tokens=sum(segment.length for row in rows for segment in row),
        unshared_tokens=sum(branch.at + len(branch.tokens) for branch in branches),
        examples=len(branches),
        attention_pairs=sum(row_pairs(groups, row) for row in rows),
    )
