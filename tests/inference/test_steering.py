"""What the options ask for."""

from collections import Counter

import pytest

from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import ConfigError, DataError
from steerjax.inference.steering import hashed, label_of, parse_attributes, parse_sweep, swept, top_combinations
from steerjax.schema import HELPSTEER, STEERLM, make_schema
from tests.refusals import refused

pytestmark = pytest.mark.short
OWN = make_schema("helpsteer", (("tone", -2, 2.5), ("wit", 1, 10)))


def test_attributes_over_defaults():
    asked = parse_attributes("helpfulness=4, verbosity=1,coherence=none", HELPSTEER)
    assert asked == {"helpfulness": 4, "verbosity": 1, "coherence": None}
    assert label_of(asked, {"coherence": 4, "complexity": 2}) == {"complexity": 2, "helpfulness": 4, "verbosity": 1}
    assert label_of(parse_attributes("none", HELPSTEER), dict.fromkeys(HELPSTEER.names, 4)) == {}
    assert parse_attributes("verbosity=2.5", HELPSTEER) == {"verbosity": 2}


@pytest.mark.parametrize(
    "text",
    ["kindness=4", "helpfulness=5", "helpfulness", "helpfulness=x", "helpfulness=nan", "kindness=none",
     "helpfulness=1,helpfulness=2"],
)  # fmt: skip
def test_attributes_refused(text):
    with refused(ConfigError, f"--attributes {text}"):
        parse_attributes(text, HELPSTEER)


def test_sweep():
    assert parse_sweep("verbosity=0..4", HELPSTEER) == {"verbosity": [0, 1, 2, 3, 4]}
    assert parse_sweep("verbosity=4,0", HELPSTEER) == {"verbosity": [4, 0]}
    assert parse_sweep("verbosity=4..2", HELPSTEER) == {"verbosity": [4, 3, 2]}
    assert parse_sweep("verbosity=3..3", HELPSTEER) == {"verbosity": [3]}
    settings = swept("helpfulness=4", ["verbosity=0,4", "complexity=1..2"], HELPSTEER)
    assert [(s["helpfulness"], s["verbosity"], s["complexity"]) for s in settings] == [
        (4, 0, 1), (4, 0, 2), (4, 4, 1), (4, 4, 2),
    ]  # fmt: skip
    assert swept("", [], HELPSTEER) == [{}]
    for text in (
        "verbosity=0..9",
        "verbosity=0..1000000000000",
        "verbosity=",
        "verbosity=0..2..4",
        "verbosity=1.5",
        "x",
    ):
        with refused(ConfigError, f"--sweep {text}", cure="verbosity=0..4"):
            parse_sweep(text, HELPSTEER)


def test_attributes_of_the_users_own():
    assert parse_sweep("wit", OWN) == {"wit": list(range(1, 11))}
    assert parse_sweep("tone=2..-2", OWN) == {"tone": [2, 1, 0, -1, -2]}
    assert parse_attributes("tone=-1.6,wit=10", OWN) == {"tone": -2, "wit": 10}
    with refused(ConfigError, "--attributes", "wit", "0", "1..10"):
        parse_attributes("wit=0", OWN)
    # The best is told by the schema's first attribute.
    rows = [rated({"tone": 2, "wit": 3}), rated({"tone": -1, "wit": 9}), rated({"tone": 2})]
    assert top_combinations(rows, OWN) == [{"tone": 2, "wit": None}, {"tone": 2, "wit": 3}]


def rated(ratings, predicted=None):
    return Conversation((Turn("user", "q"), Turn("assistant", "a", ratings, predicted)))


def test_combinations_at_top_quality():
    rows = [
        rated({"quality": 0, "humor": 0}, {"quality": 3.8, "humor": 1.2}),  # predicted ones count, rounded
        rated({"quality": 4, "humor": 1}),  # the same combination
        rated({"quality": 4}),
        rated({"quality": 2, "humor": 4}),
        rated(None),
    ]
    combinations = top_combinations(rows, STEERLM)
    assert [{k: v for k, v in c.items() if v is not None} for c in combinations] == [
        {"quality": 4}, {"quality": 4, "humor": 1},
    ]  # fmt: skip
    assert all(c.keys() == set(STEERLM.names) for c in combinations)
    # The highest that occurs, of helpfulness where no quality is rated.
    lower = [rated({"helpfulness": 3, "verbosity": 1}), rated({"helpfulness": 2, "verbosity": 4})]
    assert [label_of(c, {"coherence": 4}) for c in top_combinations(lower, HELPSTEER)] == [
        {"helpfulness": 3, "verbosity": 1}
    ]
    assert top_combinations(lower, HELPSTEER, "verbosity")[0]["verbosity"] == 4
    with refused(DataError, "coherence", cure="--quality"):
        top_combinations(lower, HELPSTEER, "coherence")


def test_hashed_evenly_and_by_what_is_given():
    counts = Counter(hashed(0, f"row {i}") % 4 for i in range(4000))
    assert all(900 < counts[n] < 1100 for n in range(4))
    assert hashed(0, [5, 6], 1) == hashed(0, [5, 6], 1)
    assert len({hashed(*values) for values in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1))}) == 5
