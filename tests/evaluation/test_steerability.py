"""Requests against what came out: numbers by hand, and against scipy."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError
from steerjax.evaluation.steerability import (
    Answer,
    format_steerability,
    plot_steerability,
    read_answers,
    requested_schema,
    steerability,
    trend,
)
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.refusals import refused


def answer(prompt, requested, text, predicted=None):
    turns = Turn("user", prompt), Turn("assistant", text)
    return Answer(Conversation(turns), requested, predicted or {})


def answers(values=(0, 2, 4), prompts=8, seed=0):
    """Longer with the requested verbosity; the predicted verbosity is the request, the rest is noise."""
    random = np.random.default_rng(seed)
    return [
        answer(
            f"prompt {prompt}", {"helpfulness": 4.0, "verbosity": float(value)},
            "ab " * int(20 * (value + 1) + random.integers(0, 5) + 10 * prompt),
            {"verbosity": value + 0.2, "helpfulness": 2.0, "complexity": float(random.random())},
        )
        for prompt in range(prompts) for value in values
    ]  # fmt: skip


@pytest.mark.short
def test_means_and_distance_by_hand():
    two = [
        answer("p", {"verbosity": 0.0}, "one two", {"verbosity": 0.4}),
        answer("q", {"verbosity": 0.0}, "one", {"verbosity": 0.6}),
        answer("p", {"verbosity": 4.0, "helpfulness": 4.0}, ""),
        answer("q", {"verbosity": 4.0, "helpfulness": 4.0}, "one two three", {"verbosity": 4.9, "helpfulness": 2.5}),
    ]
    result = steerability(two, HELPSTEER)
    assert list(result["attributes"]) == ["helpfulness", "verbosity"]
    assert result["attributes"]["verbosity"]["values"] == [
        {"requested": 0.0, "n": 2, "characters": 5.0, "words": 1.5, "predicted": 0.5, "exact": 0.5},
        {"requested": 4.0, "n": 2, "characters": 6.5, "words": 1.5, "predicted": 4.9, "exact": 1.0},
    ]
    assert result["attributes"]["helpfulness"]["trends"] == {}
    # Differing attributes: none, verbosity, (no prediction), helpfulness (2.5 rounds to 2).
    assert result["distance"] == {"mean": 2 / 3, "n": 3, "attributes": ["helpfulness", "verbosity"]}


@pytest.mark.short
def test_correlation_is_scipys_and_the_p_value_is_small_for_an_effect():
    given = answers()
    requested = np.array([a.requested["verbosity"] for a in given])
    characters = np.array([len(a.text) for a in given], float)
    found = steerability(given, HELPSTEER)["attributes"]["verbosity"]["trends"]
    assert found["characters"]["spearman"] == pytest.approx(spearmanr(requested, characters).statistic)
    assert found["characters"]["p"] == 1 / 5000
    assert found["predicted"]["spearman"] == pytest.approx(1.0)


@pytest.mark.short
def test_p_values_are_uniform_without_an_effect():
    """Prompts differ a lot and requests do nothing; permutation within prompts, and among all."""
    random = np.random.default_rng(0)
    p_values = {"within": [], "among": []}
    for seed in range(40):
        requested = np.tile([0.0, 1.0, 2.0], 6)
        measured = np.repeat(100 * random.random(6), 3) + random.random(18)
        within = trend(requested, measured, np.repeat(list("abcdef"), 3), seed)
        among = trend(requested, random.random(18), [f"{i}" for i in range(18)], seed)
        p_values["within"].append(within["p"])
        p_values["among"].append(among["p"])
    for found in p_values.values():
        assert 0.3 < np.mean(found) < 0.7
        assert min(found) > 0.001


@pytest.mark.short
def test_prompts_are_permuted_apart():
    """Each prompt's answer grows with the request, by less than prompts differ: seen within prompts only."""
    requested = np.tile([0.0, 4.0], 12)
    measured = np.repeat(np.arange(12) * 100.0, 2) + requested
    within = trend(requested, measured, [f"{i // 2}" for i in range(24)], 0)
    among = trend(requested, measured, [f"{i}" for i in range(24)], 0)
    assert within["spearman"] == among["spearman"] < 0.2
    assert within["p"] < 0.01 < 0.3 < among["p"]


@pytest.mark.short
def test_nothing_to_correlate():
    constant = trend(np.array([0.0, 4.0]), np.array([5.0, 5.0]), ["a", "b"], 0)
    assert constant == {"n": 2, "spearman": None, "p": None}
    unrated = trend(np.array([0.0, 4.0, 2.0]), np.array([np.nan, 1.0, np.nan]), ["a", "b", "c"], 0)
    assert unrated == {"n": 1, "spearman": None, "p": None}
    assert steerability([], HELPSTEER)["attributes"] == {}


def test_table_and_plot(tmp_path):
    given = answers()
    text = format_steerability(steerability(given, HELPSTEER))
    lines = text.splitlines()
    assert lines[0].split() == ["attribute", "requested", "n", "characters", "words", "predicted", "exact"]
    assert lines[2].split()[:3] == ["verbosity", "0", "8"]
    assert "Spearman of the request with characters +" in text
    assert "distance: 1.00 of 2 attributes differ" in text
    plot_steerability(given, HELPSTEER["verbosity"], tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    plot_steerability([answer("p", {"tone": 1.0}, "x")], Attribute("tone", 1.0, 9.0), tmp_path / "h.png")


@pytest.mark.short
def test_ranges_are_the_models_or_told_from_the_answers():
    given = [
        answer("p", {"warmth": 2.0, "verbosity": 1.0}, "x", {"warmth": 6.3}),
        answer("q", {"warmth": 5.0}, "y"),
        answer("r", {"tone": 3.0}, "z"),
    ]
    schema = requested_schema(given, HELPSTEER)
    assert [(a.name, a.low, a.high) for a in schema.attributes] == [
        ("verbosity", 0, 4), ("warmth", 2, 5), ("tone", 3, 4)
    ]  # fmt: skip
    schema = requested_schema(given, Schema((Attribute("warmth", 1.0, 9.0),)))
    own = steerability(given, schema)
    assert list(own["attributes"]) == ["warmth", "verbosity", "tone"]
    assert own["attributes"]["warmth"]["values"][0]["exact"] == 0.0
    with refused(DataError, "warmth", "1..4", cure="--schema"):
        requested_schema(given, Schema((Attribute("warmth", 1.0, 4.0),)))


@pytest.mark.short
def test_rows_that_are_no_answers(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "ratings": {"own name": 7}}]
    good = {"turns": turns, "id": 3, "generation": {"attributes": {"warmth": 9}, "sample": 0}}
    bad = [
        {"turns": turns},
        {"turns": turns, "generation": {"attributes": {"warmth": "high"}}},
        {"turns": turns[:1], "generation": {"attributes": {}}},
        {"turns": [], "generation": {"attributes": {}}},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(good) + "\n")
    (read,) = read_answers(str(path))
    assert (read.requested, read.text, read.predicted) == ({"warmth": 9.0}, "", {})
    for row in bad:
        path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        with refused(DataError, "answers.jsonl:2", cure="generate"):
            list(read_answers(str(path)))
