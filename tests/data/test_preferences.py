"""Pairs of responses from every source, and what is refused."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from steerjax.data.conversation import Turn
from steerjax.data.preferences import Preference, preference_from_row, read_preferences
from steerjax.errors import ConfigError, DataError

SHARED = (
    Path(os.environ.get("STEERJAX_SHARED", Path(__file__).parents[3] / "shared")) / "data/chat/hh_helpful_200.jsonl"
)

HELPSTEER2 = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 2, "split": "train"}
HELPSTEER3 = {
    "domain": "general",
    "context": [{"role": "user", "content": "p"}],
    "response1": "a",
    "response2": "b",
    "overall_preference": -3,
}
HH = {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}
OWN = {"turns": [{"role": "user", "content": "p"}], "responses": ["a", "b"], "preference": 0}
PROMPT = (Turn("user", "p"),)


def test_helpsteer2():
    assert preference_from_row(HELPSTEER2, "helpsteer2-preference") == Preference(PROMPT, ("a", "b"), 2)
    row = HELPSTEER2 | {"prompt": "p\n<extra_id_1>Assistant\nx\n<extra_id_1>User\nq"}
    turns = preference_from_row(row, "helpsteer2-preference").turns
    assert turns == (Turn("user", "p"), Turn("assistant", "x"), Turn("user", "q"))
    assert preference_from_row(HELPSTEER2 | {"preference_strength": -100}, "helpsteer2-preference") is None


def test_helpsteer3():
    assert preference_from_row(HELPSTEER3, "helpsteer3") == Preference(PROMPT, ("a", "b"), -3)
    assert preference_from_row(HELPSTEER3 | {"context": "p"}, "helpsteer3").turns == PROMPT
    context = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "q"},
    ]
    got = preference_from_row(HELPSTEER3 | {"context": context}, "helpsteer3")
    assert (got.system, [turn.content for turn in got.turns]) == ("s", ["p", "x", "q"])


def test_hh():
    assert preference_from_row(HH, "hh") == Preference(PROMPT, ("a", "b"), -1)
    row = {key: f"\n\nHuman: p \n\nAssistant:\nx\ny\n\nHuman: q\n\nAssistant: {key}" for key in ("chosen", "rejected")}
    got = preference_from_row(row, "hh")
    assert got.turns == (Turn("user", "p"), Turn("assistant", "x\ny"), Turn("user", "q"))
    assert got.responses == ("chosen", "rejected")


@pytest.mark.skipif(not SHARED.exists(), reason="needs STEERJAX_SHARED")
def test_hh_sample():
    rows = [json.loads(line) for line in SHARED.open(encoding="utf-8")]
    got = [pair for _, pair in read_preferences(str(SHARED), "hh")]
    assert len(got) == len(rows) == 200
    for pair, row in zip(got, rows, strict=True):
        names = {"user": "Human", "assistant": "Assistant"}
        prompt = "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in pair.turns)
        for response, text in zip(pair.responses, (row["chosen"], row["rejected"]), strict=True):
            assert f"{prompt}\n\nAssistant: {response}".split() == text.split()


def test_round_trip():
    pair = Preference((Turn("user", "p"), Turn("assistant", "x"), Turn("user", "q")), ("a", "b"), 3, "s", "name")
    assert preference_from_row(json.loads(json.dumps(pair.to_json()))) == pair
    assert preference_from_row(OWN) == Preference(PROMPT, ("a", "b"), 0)


BAD = {  # name -> (format, row, field, part of the message)
    "strength missing": (
        "helpsteer2-preference",
        HELPSTEER2 | {"preference_strength": None},
        "preference_strength",
        "missing",
    ),
    "strength too great": ("helpsteer3", HELPSTEER3 | {"overall_preference": 4}, "overall_preference", "4 is no whole"),
    "strength no integer": ("helpsteer3", HELPSTEER3 | {"overall_preference": 0.5}, "overall_preference", "0.5 is no"),
    "strength boolean": ("preference", OWN | {"preference": True}, "preference", "True is no whole number"),
    "strength text": ("preference", OWN | {"preference": "1"}, "preference", "'1' is no whole number"),
    "strength NaN": ("preference", OWN | {"preference": float("nan")}, "preference", "nan is no whole number"),
    "response empty": ("helpsteer2-preference", HELPSTEER2 | {"response_2": " "}, "response_2", "empty"),
    "one response": ("preference", OWN | {"responses": ["a"]}, "responses", "expected a list of two"),
    "response no text": ("preference", OWN | {"responses": ["a", 1]}, "responses", "expected text, got int"),
    "context ends with the assistant": (
        "helpsteer3",
        HELPSTEER3 | {"context": [*HELPSTEER3["context"], {"role": "assistant", "content": "x"}]},
        "",
        "does not end with the user",
    ),
    "role": (
        "helpsteer3",
        HELPSTEER3 | {"context": [{"role": "tool", "content": "x"}]},
        "context[0].role",
        "role 'tool'",
    ),
    "hh without Human": ("hh", HH | {"chosen": "\n\nAssistant: a"}, "chosen", "do not alternate"),
    "hh ends with Human": ("hh", HH | {"rejected": "\n\nHuman: p"}, "rejected", "do not alternate"),
    "hh Human twice": ("hh", HH | {"chosen": "\n\nHuman: p\n\nHuman: q\n\nAssistant: a"}, "chosen", "do not alternate"),
    "hh empty response": ("hh", HH | {"chosen": "\n\nHuman: p\n\nAssistant: "}, "chosen", "empty"),
    "hh other prompt": ("hh", HH | {"rejected": "\n\nHuman: q\n\nAssistant: a"}, "rejected", "differ before the last"),
}


@pytest.mark.parametrize(("format", "row", "field", "fragment"), BAD.values(), ids=BAD)
def test_bad_row(tmp_path, format, row, field, fragment):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n", encoding="utf-8")
    ((line, error),) = read_preferences(str(path), format)
    assert isinstance(error, DataError)
    assert (line, error.file, error.line, error.field) == (2, str(path), 2, field)
    assert fragment in error.message
    assert error.cure


def test_dropped_rows_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    strengths = [("train", 1), ("train", -100), ("val", 2), ("train", 0)]
    rows = [HELPSTEER2 | {"split": split, "preference_strength": value} for split, value in strengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dropped = Counter()
    got = [pair for _, pair in read_preferences(str(path), "helpsteer2-preference", split="train", dropped=dropped)]
    assert [(pair.preference, pair.id) for pair in got] == [(1, f"{path}:1"), (0, f"{path}:4")]
    assert dropped == {"pairs without a valid response": 1, "rows of another split than train": 1}


def test_unknown_format():
    with pytest.raises(ConfigError, match="helpsteer2-preference, helpsteer3, hh"):
        next(read_preferences("x.jsonl", "dpo"))
