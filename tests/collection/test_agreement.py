"""Agreement against other people's code, and the rule that chooses raters."""

import numpy as np
import pytest

from steerjax.collection.agreement import (
    Rule,
    alphas_without,
    columns,
    interval_alpha,
    measure,
    ordinal_alpha,
    pair_kappas,
    pooled_kappa,
)
from steerjax.errors import ConfigError
from steerjax.schema import Attribute, Schema
from tests.refusals import refused

NONE = np.nan
RATINGS = np.array(
    [
        [3, 4, 3, NONE], [0, 1, NONE, 4], [2, 2, 2, 2], [4, NONE, NONE, NONE], [1, 0, 2, 0],
        [NONE, 3, 4, 1], [4, 4, 3, 4], [NONE, NONE, NONE, NONE], [0, 2, 1, 1],
    ]
)  # fmt: skip
SCHEMA = Schema((Attribute("helpfulness"), Attribute("verbosity")))


def rows_of(ratings: np.ndarray, name: str = "helpfulness") -> list[dict]:
    return [{str(r): {name: x} for r, x in enumerate(row) if np.isfinite(x)} for row in ratings]


def test_alpha_is_krippendorffs():
    """Golden: `krippendorff` 0.9.0, alpha(reliability_data=RATINGS.T, level_of_measurement=...)."""
    value, count = interval_alpha(RATINGS)
    assert value == pytest.approx(0.4407894736842105, abs=1e-14)
    assert count == 25  # of 26: a rating that stands alone says nothing
    assert ordinal_alpha(RATINGS)[0] == pytest.approx(0.44077108433734935, abs=1e-14)


@pytest.mark.parametrize(
    ("one", "other", "kappa", "count"),
    [
        (0, 1, 0.7469879518072289, 6), (0, 2, 0.7692307692307692, 5), (0, 3, 0.3382352941176471, 5),
        (1, 2, 0.5294117647058824, 6), (1, 3, 0.41666666666666663, 6), (2, 3, 0.20454545454545459, 5),
    ],
)  # fmt: skip
def test_kappa_is_scikit_learns(one, other, kappa, count):
    """Golden: scikit-learn 1.9.1, cohen_kappa_score(x, y, labels=range(5), weights="quadratic")."""
    found = pooled_kappa(RATINGS[:, one], RATINGS[:, [other]])
    assert found == (pytest.approx(kappa, abs=1e-14), count)
    table = columns(rows_of(RATINGS), [str(n) for n in range(len(RATINGS))], SCHEMA, list("0123"))
    pairs = {tuple(pair["raters"]): pair for pair in pair_kappas(table)}
    assert pairs[str(one), str(other)]["kappa"] == found[0]


def test_the_rater_who_is_off_stands_out():
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, 60)
    ratings = np.stack([np.clip(truth + random.integers(-1, 2, 60), 0, 4) for _ in range(3)], 1).astype(float)
    ratings[:, 2] = random.integers(0, 3, 60)  # chance, and below the others
    table = columns(rows_of(ratings), [str(n) for n in range(60)], SCHEMA, list("012"))
    found, without = measure(table), alphas_without(table)
    kappas = [found[f"helpfulness/kappa of {rater}"][0] for rater in "012"]
    assert kappas[2] < min(kappas[:2])
    assert without["2"]["helpfulness"] > found["helpfulness/alpha"][0] > without["0"]["helpfulness"]
    assert found["helpfulness/2 less others"][0] < -0.5
    shared = ratings[:, 2] - ratings[:, :2].mean(1)
    assert found["helpfulness/2 less others"] == (pytest.approx(shared.mean()), 60)
    assert found["helpfulness/equal"][1] == 180
    assert np.isnan(found["verbosity/alpha"][0])  # which nobody rated
    assert found["verbosity/alpha"][1] == 0


@pytest.mark.parametrize(
    "ratings", [np.full((5, 2), 3.0), np.full((5, 2), NONE), RATINGS[:, :1], np.zeros((0, 3)), RATINGS[3:4]]
)
def test_what_has_no_agreement_is_undefined(ratings):
    assert np.isnan(interval_alpha(ratings)[0])
    assert np.isnan(ordinal_alpha(ratings)[0])


def by(*helpfulness: float, **more) -> dict:
    found = {f"r{n}": {"helpfulness": value} for n, value in enumerate(helpfulness)}
    for n, value in enumerate(more.get("verbosity", ())):
        found[f"r{n}"]["verbosity"] = value
    return found


HELPSTEER2 = Rule("helpfulness", least=3, agreeing=3, spread=2)


@pytest.mark.parametrize(
    ("rule", "ratings", "kept", "why"),
    [
        (Rule("helpfulness"), by(0, 4), ["r0", "r1"], ""),  # off by default
        (Rule("helpfulness"), {"r0": {"verbosity": 1}}, ["r0"], ""),
        (HELPSTEER2, by(3, 3), ["r0", "r1"], "few"),
        (HELPSTEER2, by(4, 2, 3), ["r0", "r1", "r2"], ""),
        (HELPSTEER2, by(4, 1, 3), ["r0", "r1", "r2"], "spread"),
        (HELPSTEER2, by(0, 4, 3, 4), ["r1", "r2", "r3"], ""),
        (HELPSTEER2, by(0, 4, 0, 4, 1), ["r0", "r2", "r4"], ""),
        (HELPSTEER2, by(2, 2, 2, 2, verbosity=(0, 4, 4, 4)), ["r1", "r2", "r3"], ""),  # of equals, on the others
        (HELPSTEER2, {**by(3, 3), "r2": {"verbosity": 1}}, ["r0", "r1"], "few"),  # did not rate what decides
    ],
)
def test_rule(rule, ratings, kept, why):
    assert rule.apply(ratings) == (kept, why)


def test_rules_that_are_none():
    for values in ({"least": 0}, {"agreeing": 1}, {"spread": -1.0}, {"spread": float("nan")}):
        with refused(ConfigError):
            Rule("helpfulness", **values)
