"""What requests did: numbers by hand, against scipy, and effects that are built in."""

import json

import numpy as np
import pytest
from scipy.stats import linregress, spearmanr

from steerjax.data.conversation import Conversation, Turn
from steerjax.evaluation.steerability import goal_space, measured
from steerjax.evaluation.steering_answers import SteeredAnswer
from steerjax.evaluation.steering_measures import HELD, columns, held, measure, slope, trend, trends
from steerjax.report.figures import figures
from steerjax.schema import HELPSTEER

NEUTRAL = {"helpfulness": 4.0, "complexity": 2.0, "verbosity": 2.0}


def answer(prompt, requested, text, predicted=None):
    turns = Turn("user", prompt), Turn("assistant", text)
    return SteeredAnswer(Conversation(turns), requested, predicted or {})


def rows_of(answers, neutral=NEUTRAL):
    made = [measured(each, goal_space(HELPSTEER), neutral, None) for each in answers]
    return json.loads(json.dumps(made, allow_nan=False))


def oracle(prompts=30, seed=0):
    """Each attribute in turn from 0 to 4. 25 words a point of verbosity; predicted verbosity 0.8 a point of it; a
    point of complexity raises predicted helpfulness by 0.3; the rest is noise. Prompts differ much."""
    random, answers = np.random.default_rng(seed), []
    grid = [NEUTRAL, *(NEUTRAL | {name: float(n)} for name in NEUTRAL for n in range(5) if n != NEUTRAL[name])]
    for prompt in range(prompts):
        for asked in grid:
            words = 30 + 25 * asked["verbosity"] + 40 * prompt + random.integers(-3, 4)
            predicted = {"helpfulness": 1.0 + 0.3 * asked["complexity"], "complexity": 2.0}
            predicted["verbosity"] = 0.3 + 0.8 * asked["verbosity"]
            noisy = {name: float(value + random.normal(0, 0.1)) for name, value in predicted.items()}
            answers.append(answer(f"prompt {prompt}", asked, "abc " * int(words), noisy))
    return answers


def test_an_oracle_has_its_built_in_slopes_and_no_false_leakage():
    found = figures(measure, columns(rows_of(oracle())))
    for name, built_in in (
        ("verbosity/slope/words", 25), ("verbosity/slope/characters", 100), ("verbosity/slope/predicted", 0.8),
        ("leakage/complexity/helpfulness", 0.3), ("complexity/slope/words", 0), ("helpfulness/slope/words", 0),
        ("leakage/verbosity/helpfulness", 0), ("leakage/verbosity/complexity", 0), ("leakage/complexity/verbosity", 0),
        ("leakage/helpfulness/verbosity", 0), ("leakage/helpfulness/complexity", 0),
    ):  # fmt: skip
        value, count, (low, high) = found[name]
        assert low <= built_in <= high, (name, found[name])
        assert high - low < 1.5 if "words" in name else high - low < 6, name
        assert count == 30 * 5
        assert low <= value <= high
    assert found["verbosity/rising/words"].value == found["verbosity/rising/predicted"].value == 1
    assert found["verbosity/spearman/predicted"].value > 0.95
    assert found["verbosity=3/predicted"].value == pytest.approx(2.7, abs=0.1)
    assert found["verbosity=3/predicted"].count == 30


@pytest.mark.short
def test_figures_by_hand():
    two = [
        answer("p", {"verbosity": 0.0}, "one two", {"verbosity": 0.4, "coherence": 1.0}),
        answer("q", {"verbosity": 0.0}, "one", {"verbosity": 0.6, "coherence": 2.0}),
        answer("p", {"verbosity": 4.0}, ""),
        answer("q", {"verbosity": 4.0}, "one two three", {"verbosity": 4.9, "coherence": 0.0}),
    ]
    rows = rows_of(two, {"verbosity": 0.0})
    assert [row["neutral"] for row in rows] == [True, True, False, False]
    assert rows[3]["output"] == {"coherence": 0.0, "verbosity": 1.0}  # 4.9 is clipped to the range
    assert rows[3]["goal"] == {"coherence": None, "verbosity": 1.0}
    found = measure(columns(rows))
    for name, expected in {
        "verbosity=0/characters": (5, 2), "verbosity=4/characters": (6.5, 2), "verbosity=0/words": (1.5, 2),
        "verbosity=0/predicted": (0.5, 2), "verbosity=4/predicted": (4.9, 1), "verbosity/exact": (2 / 3, 3),
        "verbosity/exact by chance": (1 / 3, 3),
        "verbosity/slope/characters": (1.5 / 4, 4), "verbosity/rising/words": (0, 4),
        "distance": (1 / 3, 3), "cut": (0, 4), "verbosity/slope/predicted": (4.3 / 4, 3),
        "leakage/verbosity/coherence": (-2 / 4, 3),
    }.items():  # fmt: skip
        assert found[name] == pytest.approx(expected), name
    # q went from (coherence 1/2, verbosity 0.15) to (0, 1); verbosity 1 was asked for.
    assert found["steerbench/steering error"] == pytest.approx((0.5, 1))
    assert found["steerbench/miscalibration"] == pytest.approx((0, 1), abs=1e-6)
    assert found["steerbench/orthogonality"] == pytest.approx((0.5 / np.hypot(0.5, 0.85), 1), abs=1e-3)


@pytest.mark.short
@pytest.mark.parametrize(("requested", "what", "counts"), [
    ([[0, 2], [4, 2], [2, 0], [2, 2]], HELD[0], [1, 1, 0, 1]),  # the sweep of the other attribute does not count
    ([[0, 0], [0, 4], [4, 0], [4, 4]], HELD[0], [1, 1, 1, 1]),  # every combination
    ([[0, 2], [0, 2], [0, 2], [0, 2]], HELD[3], [1, 1, 1, 1]),  # one rating alone
    ([[0, np.nan], [4, np.nan], [np.nan, 1], [np.nan, 3]], HELD[0], [1, 1, 0, 0]),  # labels of one attribute
    ([[0, 0], [4, 4], [0, 0], [4, 4]], HELD[2], [1, 1, 1, 1]),  # both move together
])  # fmt: skip
def test_what_is_held(requested, what, counts):
    found, strata, seen = held(np.array(["p"] * 4), np.array(requested, np.float64), 0)
    assert (found, seen.tolist()) == (what, [bool(n) for n in counts])
    assert what != HELD[0] or len(np.unique(strata[seen])) == len({str(row[1]) for row in np.array(requested)[seen]})


@pytest.mark.short
def test_answers_to_different_prompts():
    units = np.array(list("abcd"))
    assert held(units, np.array([[0.0, 1], [4, 1], [2, 1], [2, 1]]), 0)[0] == HELD[1]
    assert held(units, np.array([[0.0, 1], [4, 2], [2, 3], [2, 4]]), 0)[0] == HELD[3]


@pytest.mark.short
def test_slope_and_correlation_are_scipys():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 5, 40).astype(float), random.random(40)
    assert slope(x, y) == (pytest.approx(linregress(x, y).slope, abs=1e-12), 40)
    assert np.isnan(slope(x[:1], y[:1])[0])
    found = trend(x, y, np.zeros(40, int))
    assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    steady = trend(x, x + 0.01 * y, np.zeros(40, int))
    assert steady["p"] == 1 / 5000


@pytest.mark.short
def test_p_values_are_uniform_without_an_effect():
    """Prompts differ a lot and requests do nothing; permutation within prompts, and among all."""
    random = np.random.default_rng(0)
    p_values = {"within": [], "among": []}
    for seed in range(40):
        requested = np.tile([0.0, 1.0, 2.0], 6)
        measured = np.repeat(100 * random.random(6), 3) + random.random(18)
        p_values["within"].append(trend(requested, measured, np.repeat(np.arange(6), 3), seed)["p"])
        p_values["among"].append(trend(requested, random.random(18), np.zeros(18, int), seed)["p"])
    for found in p_values.values():
        assert 0.3 < np.mean(found) < 0.7
        assert min(found) > 0.001


@pytest.mark.short
def test_prompts_are_permuted_apart():
    """Each prompt's answer grows with the request, by less than prompts differ: seen within prompts only."""
    requested = np.tile([0.0, 4.0], 12)
    measured = np.repeat(np.arange(12) * 100.0, 2) + requested
    within = trend(requested, measured, np.repeat(np.arange(12), 2))
    among = trend(requested, measured, np.zeros(24, int))
    assert within["spearman"] == among["spearman"] < 0.2
    assert within["p"] < 0.01 < 0.3 < among["p"]


@pytest.mark.short
@pytest.mark.parametrize(("change", "undefined"), [
    ("constant", ["verbosity/spearman/predicted", "verbosity/exact", "verbosity/exact by chance"]),
    ("single", ["verbosity/slope/predicted", "verbosity/rising/words", "verbosity/spearman/words"]),
    ("unrated", ["verbosity/slope/predicted", "verbosity/exact", "distance", "steerbench/steering error"]),
    ("no neutral", ["steerbench/steering error", "steerbench binned/orthogonality"]),
])  # fmt: skip
def test_what_is_undefined_is_none(change, undefined):
    asked = [2.0] if change == "single" else [0.0, 4.0]
    predicted = {"constant": {"verbosity": 0.4}, "unrated": {}}.get(change)  # 0.4 rounds to what half asked for
    answers = [
        answer(p, {"verbosity": n}, "word " * int(n + 1), {"verbosity": n / 2} if predicted is None else predicted)
        for p in "pqr" for n in asked
    ]  # fmt: skip
    rows = rows_of(answers, {"verbosity": 3.0 if change == "no neutral" else asked[0]})
    table = columns(rows)
    found = figures(measure, table)
    for name in undefined:
        assert found[name].value is None, name
    json.dumps([{name: figure.to_json() for name, figure in found.items()}, trends(rows, table)], allow_nan=False)
    if change == "constant":
        assert found["verbosity/slope/predicted"].value == 0


def test_rows_with_gaps_measure_what_is_there():
    """A prompt without predictions, an answer without a neutral one: the others' figures are as without them."""
    whole = oracle(6)
    gaps = [answer("unrated", each.requested, "word") for each in whole[:13]]
    alone = [
        answer("alone", NEUTRAL | {"verbosity": 0.0}, "word", {"verbosity": 0.0, "helpfulness": 1.0, "complexity": 2})
    ]
    expected, found = (measure(columns(rows_of(each))) for each in (whole, whole + gaps + alone))
    for name in ("steerbench/steering error", "verbosity/slope/predicted", "leakage/complexity/helpfulness"):
        assert found[name] == pytest.approx(expected[name]), name
    assert found["verbosity/slope/words"][1] == expected["verbosity/slope/words"][1] + 5
