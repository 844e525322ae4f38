"""Counts, and the moments against their textbook formulas."""

import math
import statistics

import pytest

from steerjax.data.conversation import Conversation, Turn
from steerjax.data.statistics import format_statistics, statistics_of
from steerjax.schema import OASST, STEERLM, make_schema


def conversation(*ratings):
    turns = []
    for index, rating in enumerate(ratings):
        turns += [Turn("user", "u"), Turn("assistant", "a" * (index + 1), rating)]
    return Conversation(tuple(turns))


def test_ratings():
    rows = [
        conversation({"helpfulness": 4.0, "verbosity": 1.0}, {"helpfulness": 2.0, "verbosity": 3.0, "quality": 1.0}),
        conversation({"helpfulness": 0.0}, None, {"verbosity": 2.0}),
        conversation({"helpfulness": 3.0, "verbosity": 0.0}),
    ]
    got = statistics_of(rows, STEERLM)
    counts = {name: got[name] for name in ("rows", "turns", "assistant_turns", "rated_turns")}
    assert counts == {"rows": 3, "turns": 12, "assistant_turns": 6, "rated_turns": 5}
    assert list(got["values"]) == ["quality", "helpfulness", "verbosity", "characters"]
    helpfulness, verbosity = got["values"]["helpfulness"], got["values"]["verbosity"]
    assert (helpfulness["count"], helpfulness["mean"]) == (4, 2.25)
    assert helpfulness["std"] == pytest.approx(statistics.pstdev([4, 2, 0, 3]))
    assert (verbosity["count"], verbosity["mean"]) == (4, 1.5)
    assert got["values"]["quality"] == {"count": 1, "mean": 1.0, "std": 0.0}
    characters = got["values"]["characters"]
    assert (characters["count"], characters["mean"]) == (6, statistics.mean([1, 2, 1, 2, 3, 1]))


def test_unrated():
    got = statistics_of([conversation(None)], OASST)
    assert (got["rated_turns"], list(got["values"])) == (0, ["characters"])
    assert not any(isinstance(v, float) and math.isnan(v) for v in got["values"]["characters"].values())


def test_own_attributes():
    schema = make_schema("helpsteer", [("depth", 1, 5), ("clarity", 1, 10)])
    rows = [conversation({"clarity": 9.0}), conversation({"clarity": 1.0}, {"depth": 2.0})]
    got = statistics_of(rows, schema)
    assert list(got["values"]) == ["depth", "clarity", "characters"]
    assert got["values"]["clarity"]["mean"] == 5


def test_table_is_aligned():
    text = format_statistics(statistics_of([conversation({"helpfulness": 4.0})], STEERLM))
    counts, table = text.split("\n\n")
    assert counts.splitlines() == [
        "rows             1",
        "turns            2",
        "assistant turns  1",
        "rated turns      1",
    ]
    header, *rows = table.splitlines()
    assert header.split() == ["count", "mean", "std"]
    assert [row.split() for row in rows] == [
        ["helpfulness", "1", "4.0000", "0.0000"],
        ["characters", "1", "1.0000", "0.0000"],
    ]
    assert {len(line) for line in table.splitlines()} == {len(header)}
