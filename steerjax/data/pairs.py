"""Pairs from ratings: two responses to one prompt, of which one is rated higher."""

import collections
import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace

from steerjax.data.conversation import Conversation, context_key


def pairs_of(
    rows: Iterable[Conversation], weights: Mapping[str, float], least: float, each: int = 0
) -> list[Conversation]:
    """Every two responses to the same turns whose weighted sums of human ratings differ by at least `least` and more
    than 0, the better one in `turns`; the difference is the strength. Responses that lack a rating make no pair.

    A response may stand in several pairs, in at most `each` of them where that is not 0: then they are drawn by chance
    (always the same). Its turn has its row's id, so that its ratings count once.
    """
    groups: dict[str, list[tuple[float, Conversation]]] = {}
    for row in rows:
        *before, last = row.turns
        ratings = last.ratings or {}
        if last.role == "assistant" and weights.keys() <= ratings.keys():
            score = sum(weight * ratings[name] for name, weight in weights.items())
            last = replace(last, id=last.id or row.id)
            groups.setdefault(context_key(row.system, before), []).append((score, replace(row, turns=(*before, last))))
    pairs = []
    for group in groups.values():
        chosen, used = list(itertools.combinations(group, 2)), collections.Counter()
        if each:
            random.Random(0).shuffle(chosen)
        for two in chosen:
            (low, worse), (high, better) = sorted(two, key=lambda one: one[0])
            free = not each or max(used[id(better)], used[id(worse)]) < each
            if free and high - low >= max(least, 1e-9) and better.turns[-1].content != worse.turns[-1].content:
                used.update((id(better), id(worse)))
                name = f"{better.id} over {worse.id}"
                pairs.append(replace(better, id=name, rejected=worse.turns, strength=high - low))
    return pairs
