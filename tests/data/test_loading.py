"""Loading, duplicates and splits: nothing vanishes, and no prompt is on both sides."""

import hashlib
import json
import random

import pytest

from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import (
    Skipped,
    check_disjoint,
    file_hashes,
    kfold_by_prompt,
    load_conversations,
    prompt_key,
    split_by_prompt,
    write_skipped,
)
from steerjax.errors import ConfigError, DataError
from steerjax.schema import HELPSTEER


def row(prompt="p", response="r", **ratings):
    return {"prompt": prompt, "response": response, **(ratings or {"helpfulness": 3})}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return str(path)


def made_up(prompts=20, responses=3):
    return [
        Conversation((Turn("user", f"prompt {p}"), Turn("assistant", f"answer {r}")), file="f", line=p * responses + r)
        for p in range(prompts)
        for r in range(responses)
    ]


def prompts_of(conversations):
    return {conversation.turns[0].content for conversation in conversations}


def test_the_sample_loads_with_its_repeated_rows():
    conversations, skipped = load_conversations(["embedded:helpsteer"], HELPSTEER, on_duplicate="keep")
    assert (len(conversations), len({prompt_key(c) for c in conversations}), skipped) == (429, 120, [])
    unique, repeated = load_conversations(["embedded:helpsteer"], HELPSTEER, on_duplicate="skip")
    assert (len(unique), len(repeated)) == (405, 24)


def test_a_duplicate_is_refused_with_both_lines(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", row("q"), row())
    second = write_rows(tmp_path / "b.jsonl", row(helpfulness=3.0))
    with pytest.raises(DataError, match="the same row as") as caught:
        load_conversations([first, second], HELPSTEER)
    assert (caught.value.file, caught.value.line) == (second, 1)
    assert f"{first}:2" in caught.value.message
    assert "'keep'" in caught.value.cure
    assert "'skip'" in caught.value.cure


def test_duplicates_are_skipped_or_kept_as_asked(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(), row("q"), row())
    conversations, skipped = load_conversations([path], HELPSTEER, on_duplicate="skip")
    assert [c.line for c in conversations] == [1, 2]
    assert skipped == [Skipped(path, 3, f"duplicate of {path}:1")]
    assert len(load_conversations([path], HELPSTEER, on_duplicate="keep")[0]) == 3


def test_a_source_of_duplicates_alone_is_not_empty(tmp_path):
    path, copy = write_rows(tmp_path / "a.jsonl", row()), write_rows(tmp_path / "b.jsonl", row())
    conversations, skipped = load_conversations([path, copy], HELPSTEER, on_duplicate="skip")
    assert (len(conversations), len(skipped)) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [row(helpfulness=2), row(helpfulness=3, verbosity=1), row(response="r "), row(prompt="P"), row() | {"system": "s"}],
    ids=["rating", "more ratings", "response", "prompt", "system"],
)
def test_rater_noise_and_other_texts_are_no_duplicates(tmp_path, other):
    path = write_rows(tmp_path / "a.jsonl", row(), other)
    assert len(load_conversations([path], HELPSTEER)[0]) == 2


def test_skipped_rows_are_listed_with_reasons(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(response=""), row(), row("q", helpfulness=9))
    conversations, skipped = load_conversations([path], HELPSTEER, on_bad_row="skip")
    assert [c.line for c in conversations] == [2]
    write_skipped(tmp_path / "skipped.jsonl", skipped)
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": path, "line": 1, "reason": "field 'response': empty"},
        {"file": path, "line": 3, "reason": "field 'helpfulness': rating 9 is outside 0..4"},
    ]


def test_the_first_bad_row_stops_the_run_and_names_the_way_on(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(), row(response=""), row(response=None))
    with pytest.raises(DataError, match="on_bad_row='skip'") as caught:
        load_conversations([path], HELPSTEER)
    assert caught.value.line == 2


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    good, bad = write_rows(tmp_path / "a.jsonl", row()), write_rows(tmp_path / "b.jsonl", row(response=""), {})
    with pytest.raises(DataError, match="no usable row: 2 skipped, the first at line 1: field 'response'") as caught:
        load_conversations([good, bad], HELPSTEER, on_bad_row="skip")
    assert caught.value.file == bad
    with pytest.raises(DataError, match="no source"):
        load_conversations([], HELPSTEER)


@pytest.mark.parametrize("option", [{"on_bad_row": "ignore"}, {"on_duplicate": "drop"}, {"format": "chat"}])
def test_unknown_options_are_refused(option):
    with pytest.raises(ConfigError, match="use one of"):
        load_conversations(["embedded:helpsteer2"], HELPSTEER, **option)


def test_prompt_key_sees_the_first_turn_only():
    def key(*contents, system=None):
        turns = (Turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents))
        return prompt_key(Conversation(tuple(turns), system=system))

    assert key("What  is\nÄ?", "x") == key(" what is ä? ", "y")
    assert key("a", "b", "c", "d") == key("a", "e", "f", "g") == key("a")
    assert key("a", system="b") == key("a", system="") == key("a")
    assert len({key("a"), key("b"), key("ab")}) == 3


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 5), (0.01, 1), (0.5, 10), (0.93, 19)])
def test_split_counts_prompts(fraction, expected):
    train, validation = split_by_prompt(made_up(), fraction, seed=0)
    assert len(prompts_of(validation)) == expected
    assert prompts_of(train).isdisjoint(prompts_of(validation))
    assert len(train) + len(validation) == 60


def test_split_depends_on_prompts_and_seed_alone():
    conversations = made_up()
    shuffled = random.Random(1).sample(conversations, len(conversations))
    chosen = prompts_of(split_by_prompt(conversations, 0.25, seed=0)[1])
    assert prompts_of(split_by_prompt(shuffled, 0.25, seed=0)[1]) == chosen
    assert prompts_of(split_by_prompt(conversations[::3], 0.25, seed=0)[1]) == chosen
    assert len({frozenset(prompts_of(split_by_prompt(conversations, 0.25, seed)[1])) for seed in range(-5, 5)}) > 5
    train, _ = split_by_prompt(conversations, 0.25, seed=0)
    assert [c.line for c in train] == sorted(c.line for c in train)


def test_split_is_the_same_on_every_machine():
    assert prompts_of(split_by_prompt(made_up(), 0.1, seed=0)[1]) == {"prompt 14", "prompt 18"}


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_refuses_fractions_outside_the_open_interval(fraction):
    with pytest.raises(ConfigError, match="fraction"):
        split_by_prompt(made_up(), fraction, seed=0)


def test_split_refuses_an_empty_side():
    with pytest.raises(DataError, match="no prompt is left for training: there are 1"):
        split_by_prompt(made_up(prompts=1), 0.5, seed=0)
    with pytest.raises(DataError, match="no prompt is left for validation: there are 3"):
        kfold_by_prompt(made_up(prompts=3), folds=4, fold=3, seed=0)


def test_folds_cover_every_prompt_once():
    conversations = made_up(prompts=11)
    parts = [kfold_by_prompt(conversations, 4, fold, seed=3) for fold in range(4)]
    assert sorted(len(prompts_of(validation)) for _, validation in parts) == [2, 3, 3, 3]
    assert sorted(c.line for _, validation in parts for c in validation) == [c.line for c in conversations]
    for train, validation in parts:
        check_disjoint(train, validation)
        assert len(train) + len(validation) == len(conversations)


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (4, 4), (4, -1)])
def test_folds_out_of_range(folds, fold):
    with pytest.raises(ConfigError, match="fold"):
        kfold_by_prompt(made_up(), folds, fold, seed=0)


def test_a_prompt_on_both_sides_is_refused_with_both_places():
    train = [Conversation((Turn("user", "Why?"), Turn("assistant", "a")), file="train.jsonl", line=4)]
    validation = [Conversation((Turn("user", "why? "), Turn("assistant", "b")), file="valid.jsonl", line=9)]
    with pytest.raises(DataError, match=r"train\.jsonl:4") as caught:
        check_disjoint(train, validation)
    assert (caught.value.file, caught.value.line) == ("valid.jsonl", 9)
    check_disjoint(train, made_up(2))


def test_file_hashes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    dataset = datasets.Dataset.from_list([row()])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: dataset)
    path = write_rows(tmp_path / "a.jsonl", row())
    hashes = file_hashes([path, "embedded:helpsteer2", "hub:nvidia/HelpSteer2"])
    assert hashes[path] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert len(hashes["embedded:helpsteer2"]) == 64
    assert hashes["hub:nvidia/HelpSteer2"] == dataset._fingerprint
    with pytest.raises(DataError, match="no such file"):
        file_hashes([str(tmp_path / "none.jsonl")])
