"""Answers that are read, the grid of requests, and the request that steering is measured from."""

import json

import pytest

from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import ConfigError, DataError
from steerjax.evaluation.steering_answers import SteeredAnswer, grid_of, neutral_request, read_answers, requested_schema
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.refusals import refused

pytestmark = pytest.mark.short
TWO = Schema((Attribute("wit", 1.0, 5.0), Attribute("depth", 1.0, 10.0)))


def answer(requested, prompt="p"):
    return SteeredAnswer(Conversation((Turn("user", prompt), Turn("assistant", "x"))), requested, {})


def test_ranges_are_the_models_or_told_from_the_answers():
    given = [answer({"warmth": 2.0, "verbosity": 1.0}), answer({"warmth": 5.0}), answer({"tone": 3.0})]
    schema = requested_schema(given, HELPSTEER)
    assert [(a.name, a.low, a.high) for a in schema.attributes] == [
        ("verbosity", 0, 4), ("warmth", 2, 5), ("tone", 3, 4)
    ]  # fmt: skip
    assert requested_schema(given, Schema((Attribute("warmth", 1.0, 9.0),))).names == ("warmth", "verbosity", "tone")
    with refused(DataError, "warmth", "1..4", cure="--schema"):
        requested_schema(given, Schema((Attribute("warmth", 1.0, 4.0),)))


def test_rows_that_are_no_answers(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "ratings": {"own name": 7}}]
    good = {"turns": turns, "id": 3, "generation": {"attributes": {"warmth": 9}, "sample": 0, "finish": "length"}}
    bad = [
        {"turns": turns},
        {"turns": turns, "generation": {"attributes": {"warmth": "high"}}},
        {"turns": turns[:1], "generation": {"attributes": {}}},
        {"turns": [], "generation": {"attributes": {}}},
        {"turns": [*turns[:1], {**turns[1], "predicted_ratings": {"warmth": None}}], "generation": {"attributes": {}}},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(good) + "\n")
    (read,) = read_answers(str(path))
    assert (read.requested, read.text, read.predicted, read.cut) == ({"warmth": 9.0}, "", {}, True)
    assert read.conversation.id == "3"
    for row in bad:
        path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        with refused(DataError, "answers.jsonl:2", cure="generate"):
            list(read_answers(str(path)))


def test_prompts_have_a_name_of_their_own():
    names = {answer({"verbosity": n}, prompt).prompt for n in (0, 4) for prompt in "pqr"}
    assert len(names) == 3


@pytest.mark.parametrize(("requests", "expected"), [
    ([{"wit": 1}, {"wit": 3}, {"wit": 5}], {"wit": 3}),  # a sweep: the middle
    ([{"wit": 1}, {"wit": 5}], {"wit": 1}),
    ([{"wit": 5, "depth": 2}, {"wit": 5, "depth": 9}, {"wit": 1, "depth": 2}], {"wit": 5, "depth": 2}),
    ([{"wit": 1}, {"depth": 3}, {}], {}),  # labels of one attribute each
])  # fmt: skip
def test_neutral_request(requests, expected):
    assert neutral_request([answer(asked) for asked in requests], TWO) == expected


@pytest.mark.parametrize(("texts", "expected"), [
    ([], [{}, {"wit": 1}, {"wit": 3}, {"depth": 1}, {"depth": 5}, {"depth": 10}]),  # wit 5 is the default
    (["wit=1,5"], [{}, {"wit": 1}]),
    (["wit=1,2 depth=1,2"], [{}, *({"wit": w, "depth": d} for w in (1, 2) for d in (1, 2))]),
    (["wit=4..5", "depth=2"], [{}, {"wit": 4}, {"depth": 2}]),
])  # fmt: skip
def test_grid(texts, expected):
    assert grid_of(texts, {}, TWO, {"wit": 5.0}) == expected


def test_grid_over_a_neutral_request():
    assert grid_of(["wit=1"], {"wit": 4, "depth": None}, TWO, {"depth": 3.0}) == [
        {"wit": 4, "depth": None}, {"wit": 1, "depth": None}
    ]  # fmt: skip
    with refused(ConfigError, "wit", "9", cure="wit"):
        grid_of(["wit=9"], {}, TWO, None)
