"""Loading, duplicates and splits: nothing vanishes, and no prompt is on both sides."""

import hashlib
import json
import random

import pytest

from steerjax.data.conversation import Conversation, Turn
from steerjax.data.loading import (
    Skipped,
    file_hashes,
    load_conversations,
    prompt_key,
    shared_prompts,
    split_by_prompt,
    write_skipped,
)
from steerjax.errors import ConfigError, DataError
from steerjax.schema import HELPSTEER
from tests.refusals import names, refused


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
    loaded = load_conversations(["embedded:helpsteer"], HELPSTEER)
    assert (len(loaded.conversations), loaded.skipped, loaded.duplicates) == (429, [], 24)
    assert len({prompt_key(conversation) for conversation in loaded.conversations}) == 120
    unique = load_conversations(["embedded:helpsteer"], HELPSTEER, on_duplicate="skip")
    assert (len(unique.conversations), len(unique.skipped), unique.duplicates) == (405, 24, 24)


def test_duplicates_are_kept_or_skipped_as_asked_and_counted(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(), row("q"), row())
    skipping = load_conversations([path], HELPSTEER, on_duplicate="skip")
    assert [c.line for c in skipping.conversations] == [1, 2]
    assert (skipping.skipped, skipping.duplicates) == ([Skipped(path, 3, f"duplicate of {path}:1")], 1)
    keeping = load_conversations([path], HELPSTEER)
    assert (len(keeping.conversations), keeping.skipped, keeping.duplicates) == (3, [], 1)


def test_a_source_named_twice_is_all_duplicates(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(), row("q"))
    assert load_conversations([path, path], HELPSTEER).duplicates == 2


def test_a_source_of_duplicates_alone_is_not_empty(tmp_path):
    path, copy = write_rows(tmp_path / "a.jsonl", row()), write_rows(tmp_path / "b.jsonl", row())
    loaded = load_conversations([path, copy], HELPSTEER, on_duplicate="skip")
    assert (len(loaded.conversations), len(loaded.skipped)) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [row(helpfulness=2), row(helpfulness=3, verbosity=1), row(response="r "), row(prompt="P"), row() | {"system": "s"}],
    ids=["rating", "more ratings", "response", "prompt", "system"],
)
def test_rater_noise_and_other_texts_are_no_duplicates(tmp_path, other):
    path = write_rows(tmp_path / "a.jsonl", row(), other)
    loaded = load_conversations([path], HELPSTEER)
    assert (len(loaded.conversations), loaded.duplicates) == (2, 0)


def test_skipped_rows_are_listed_with_reasons(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(response=""), row(), row("q", helpfulness=9))
    loaded = load_conversations([path], HELPSTEER, on_bad_row="skip")
    assert [c.line for c in loaded.conversations] == [2]
    write_skipped(tmp_path / "skipped.jsonl", loaded.skipped)
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    listed = [json.loads(line) for line in lines]
    assert [(entry["file"], entry["line"]) for entry in listed] == [(path, 1), (path, 3)]
    assert names(listed[0]["reason"], "response")
    assert all(names(listed[1]["reason"], fact) for fact in ("helpfulness", "9", "0..4"))


def test_the_first_bad_row_stops_the_run_and_names_the_way_on(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", row(), row(response=""), row(response=None))
    with refused(DataError, f"{path}:2", "response", cure="on_bad_row='skip'"):
        load_conversations([path], HELPSTEER)


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    good, bad = write_rows(tmp_path / "a.jsonl", row()), write_rows(tmp_path / "b.jsonl", row(response=""), {})
    with refused(DataError, bad, "2", "line 1", "response"):
        load_conversations([good, bad], HELPSTEER, on_bad_row="skip")


def test_half_a_character_in_a_reason_can_be_listed(tmp_path):
    write_skipped(tmp_path / "skipped.jsonl", [Skipped("f", 1, "unknown key 'ä\ud83d'")])
    (line,) = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert "ä" in line
    assert json.loads(line)["reason"] == "unknown key 'ä\ud83d'"


def test_prompt_key_is_of_the_first_user_turn():
    opened = [Conversation((Turn("assistant", "Hello!"), Turn("user", text))) for text in ("a", "b")]
    assert prompt_key(opened[0]) != prompt_key(opened[1])
    assert prompt_key(opened[0]) == prompt_key(Conversation((Turn("user", "A "),)))


def test_prompt_key_sees_no_other_turn():
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
    with refused(ConfigError, "fraction", str(fraction)):
        split_by_prompt(made_up(), fraction, seed=0)


def test_split_refuses_an_empty_side():
    with refused(DataError, "training", "1 prompts", cure="validation files"):
        split_by_prompt(made_up(prompts=1, responses=1), 0.5, seed=0)


def test_data_of_one_prompt_is_split_by_row():
    essays = [Conversation((Turn("user", "Write."), Turn("assistant", f"essay {i}")), line=i) for i in range(40)]
    train, validation = split_by_prompt(essays + essays[:10], 0.25, seed=0)
    assert len({c.line for c in validation}) == 10
    assert {c.line for c in train}.isdisjoint(c.line for c in validation)  # equal rows are on one side
    assert shared_prompts(train, validation) == 1
    chosen = {c.line for c in split_by_prompt(essays[::-1], 0.25, seed=0)[1]}
    assert chosen == {c.line for c in validation}


def test_prompts_on_both_sides_are_counted():
    train = [Conversation((Turn("user", text), Turn("assistant", "a"))) for text in ("Why?", "Why?", "How?", "Who?")]
    validation = [Conversation((Turn("user", text), Turn("assistant", "b"))) for text in ("why? ", "who?", "When?")]
    assert shared_prompts(train, validation) == 2
    assert shared_prompts(train, made_up(2)) == 0


def test_file_hashes(tmp_path, monkeypatch):
    import datasets

    dataset = datasets.Dataset.from_list([row()])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: dataset)
    path = write_rows(tmp_path / "a.jsonl", row())
    hashes = file_hashes([path, "embedded:helpsteer2", "hub:nvidia/HelpSteer2"])
    assert hashes[path] == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert len(hashes["embedded:helpsteer2"]) == 64
    assert hashes["hub:nvidia/HelpSteer2"] == dataset._fingerprint
    with refused(DataError, str(tmp_path / "none.jsonl"), cure="embedded:NAME"):
        file_hashes([str(tmp_path / "none.jsonl")])
