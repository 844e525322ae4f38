"""How far raters agree, by attribute and by rater, and which raters of an answer to keep.

Ratings of one attribute are `[N, R]`, answers by raters, NaN where a rater gave none.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from steerjax.errors import ConfigError
from steerjax.report.figures import UNIT, Columns, prompt_units
from steerjax.report.results import kappa_of_whole, pooled_kappa, rater_pairs
from steerjax.schema import Schema


@dataclass(frozen=True)
class Rule:
    """Which ratings are used. All by default; HelpSteer2 (arXiv 2406.08673, section 2) has 3 raters at least, keeps the
    3 that agree most on helpfulness, and drops answers on which these are more than 2 apart.

    Attributes:
        by: the attribute that decides.
        least: an answer with fewer raters is dropped.
        agreeing: so many raters of an answer are kept; None for all.
        spread: an answer whose kept ratings are further apart is dropped; None for none.
    """

    by: str
    least: int = 1
    agreeing: int | None = None
    spread: float | None = None

    def __post_init__(self):
        if self.least < 1 or (self.agreeing is not None and self.agreeing < 2):
            raise ConfigError("--least-raters below 1 or --agreeing below 2; cure: e.g. 3 of both, as HelpSteer2")
        if self.spread is not None and not self.spread >= 0:
            raise ConfigError(f"--max-spread {self.spread:g}; cure: 0 or more")

    @property
    def active(self) -> bool:
        return self.least > 1 or self.agreeing is not None or self.spread is not None

    def apply(self, ratings: Mapping[str, Mapping[str, float]]) -> tuple[list[str], str]:
        """The raters of one answer that are kept, and "", or `few` or `spread`, which it is dropped for."""
        raters = list(ratings)
        if self.active:
            raters = [rater for rater in raters if self.by in ratings[rater]]
        if len(raters) < self.least:
            return raters, "few"
        if self.agreeing is not None and len(raters) > self.agreeing:
            raters = list(min(itertools.combinations(raters, self.agreeing), key=lambda few: self._apart(few, ratings)))
        given = [ratings[rater][self.by] for rater in raters if self.by in ratings[rater]]
        wide = self.spread is not None and given and max(given) - min(given) > self.spread
        return raters, "spread" if wide else ""

    def _apart(self, few: Sequence[str], ratings: Mapping) -> tuple[float, float]:
        """Summed differences of every two: of the attribute, then of the others."""
        by, others = 0.0, 0.0
        for one, other in itertools.combinations(few, 2):
            for name in ratings[one].keys() & ratings[other].keys():
                apart = abs(ratings[one][name] - ratings[other][name])
                by, others = (by + apart, others) if name == self.by else (by, others + apart)
        return by, others


def interval_alpha(ratings: np.ndarray) -> tuple[float, int]:
    """Krippendorff's alpha of `[N, R]` with squared differences, and of how many ratings: of answers with two or more.

    1 less the mean squared difference within answers over that among all ratings; NaN where these are all equal.
    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011).
    """
    seen = np.isfinite(ratings)
    usable = seen.sum(1) > 1
    ratings, seen = ratings[usable], seen[usable]
    count = int(seen.sum())
    if not count:
        return np.nan, 0
    values = np.where(seen, ratings - ratings[seen].mean(), 0.0)  # centred, so that squares do not cancel
    each = seen.sum(1)
    # Over ordered pairs, sum (x - y)^2 = 2 (m sum x^2 - (sum x)^2).
    within = 2 * np.sum((each * (values**2).sum(1) - values.sum(1) ** 2) / (each - 1)) / count
    among = 2 * (values**2).sum() / (count - 1)
    return (float(1 - within / among) if among > 0 else np.nan), count


def ordinal_alpha(ratings: np.ndarray) -> tuple[float, int]:
    """The same with Krippendorff's ordinal metric, which is the difference of the ratings' average ranks."""
    seen = np.isfinite(ratings)
    seen &= seen.sum(1, keepdims=True) > 1
    ranks = np.full(ratings.shape, np.nan)
    ranks[seen] = rankdata(ratings[seen])
    return interval_alpha(ranks)


def columns(ratings: Sequence[Mapping], prompts: Sequence[str], schema: Schema, raters: Sequence[str]) -> Columns:
    """`ATTRIBUTE:RATER` of each answer (rater -> attribute -> rating); answers to a prompt are drawn together, unless
    all have one."""
    found: dict[str, np.ndarray] = {UNIT: prompt_units(prompts)}
    for name in schema.names:
        for rater in raters:
            found[f"{name}:{rater}"] = np.array([row.get(rater, {}).get(name, np.nan) for row in ratings], np.float64)
    return found


def matrices(found: Columns) -> dict[str, tuple[list[str], np.ndarray]]:
    """By attribute: the raters, and `[N, R]`."""
    groups: dict[str, list[tuple[str, np.ndarray]]] = {}
    for key, column in found.items():
        if key != UNIT:
            name, _, rater = key.partition(":")
            groups.setdefault(name, []).append((rater, column))
    return {name: ([rater for rater, _ in group], np.stack([c for _, c in group], 1)) for name, group in groups.items()}


def measure(found: Columns) -> dict[str, tuple[float, int]]:
    """`ATTRIBUTE/alpha`, `/ordinal alpha`, `/kappa` (of every two raters, pooled), `/equal` (share of pairs), `/mean`;
    and of each rater `/kappa of RATER` with the others, `/RATER less others` in the mean of the answers they share."""
    out: dict[str, tuple[float, int]] = {}
    for name, (raters, ratings) in matrices(found).items():
        out[f"{name}/alpha"], out[f"{name}/ordinal alpha"] = interval_alpha(ratings), ordinal_alpha(ratings)
        out[f"{name}/kappa"], out[f"{name}/equal"] = _all_pairs(ratings)
        seen = np.isfinite(ratings)
        out[f"{name}/mean"] = (float(ratings[seen].mean()) if seen.any() else np.nan), int(seen.sum())
        for place, rater in enumerate(raters):
            x, others = ratings[:, place], np.delete(ratings, place, axis=1)
            out[f"{name}/kappa of {rater}"] = pooled_kappa(x, others)
            count = np.isfinite(others).sum(1)
            both = np.isfinite(x) & (count > 0)
            less = x[both] - np.nansum(others[both], axis=1) / count[both]
            out[f"{name}/{rater} less others"] = (float(less.mean()) if len(less) else np.nan), len(less)
    return out


def _all_pairs(ratings: np.ndarray) -> tuple[tuple[float, int], tuple[float, int]]:
    """Kappa of all pairs of two raters, and how often a pair is equal."""
    x, y = rater_pairs(ratings)
    kappa = kappa_of_whole(x, y)
    pairs = len(x) // 2
    return (np.nan if kappa is None else kappa, pairs), (float(np.mean(x == y)) if pairs else np.nan, pairs)


def pair_kappas(found: Columns) -> list[dict]:
    """Of every two raters with a common answer: attribute, raters, quadratic-weighted kappa (None where undefined), on
    how many answers."""
    out = []
    for name, (raters, ratings) in matrices(found).items():
        for one, other in itertools.combinations(range(len(raters)), 2):
            kappa, count = pooled_kappa(ratings[:, one], ratings[:, [other]])
            if count:
                value = None if np.isnan(kappa) else kappa
                out.append({"attribute": name, "raters": [raters[one], raters[other]], "kappa": value, "count": count})
    return out


def alphas_without(found: Columns) -> dict[str, dict[str, float | None]]:
    """Rater -> attribute -> alpha of the others' ratings; None where it is undefined."""
    out: dict[str, dict[str, float | None]] = {}
    for name, (raters, ratings) in matrices(found).items():
        for place, rater in enumerate(raters):
            value, _ = interval_alpha(np.delete(ratings, place, axis=1))
            out.setdefault(rater, {})[name] = None if np.isnan(value) else value
    return out
