"""Pairs from ratings: two responses to one prompt, of which one is rated higher."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from steerjax.data.conversation import Conversation


def pairs_of(rows: Iterable[Conversation], weights: Mapping[str, float], least: float) -> list[Conversation]:
    """Every two responses to the same turns whose weighted sums of human ratings differ by at least `least` and more
    than 0, the better one in `turns`; the difference is the strength. Responses that lack a rating make no pair.

    A response may stand in several pairs; its turn has its row's id, so that its ratings count once.
    """
    groups: dict[tuple, list[tuple[float, Conversation]]] = {}
    for row in rows:
        *before, last = row.turns
        ratings = last.ratings or {}
        if last.role == "assistant" and weights.keys() <= ratings.keys():
            score = sum(weight * ratings[name] for name, weight in weights.items())
            key = (row.system, tuple((turn.role, turn.content) for turn in before))
            last = replace(last, id=last.id or row.id)
            groups.setdefault(key, []).append((score, replace(row, turns=(*before, last))))
    pairs = []
    for group in groups.values():
        for two in itertools.combinations(group, 2):
            (low, worse), (high, better) = sorted(two, key=lambda one: one[0])
            if high - low >= max(least, 1e-9) and better.turns[-1].content != worse.turns[-1].content:
                name = f"{better.id} over {worse.id}"
                pairs.append(replace(better, id=name, rejected=worse.turns, strength=high - low))
    return pairs
