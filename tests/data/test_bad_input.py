"""Every kind of bad input: what is said, the place, the field, and a cure."""

import gzip
import json
import subprocess

import pytest

from steerjax.data.loading import load_conversations, write_skipped
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.schema import HELPSTEER
from tests.refusals import names, refused

GOOD = {"prompt": "good prompt", "response": "fine", "helpfulness": 3}


def helpsteer(**changes):
    return {"prompt": "p", "response": "r", "helpfulness": 3} | changes


def without(key):
    return {name: value for name, value in helpsteer().items() if name != key}


def reference(*turns, **fields):
    return {"conversations": [{"from": name, "value": "v", "label": label} for name, label in turns]} | fields


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(*turns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def conversation(*turns, **fields):
    return {"turns": list(turns)} | fields


def sampled(*responses, **changes):
    """A group of `steerlm2`: a prompt, what was asked for, and responses."""
    given = {"prompt_turns": [{"from": "User", "value": "p"}], "label": "helpfulness:4"} | changes
    return given | {"responses": list(responses) or [response()]}


def response(**changes):
    logs = {"log(P(a|x,y))": -1.5, "log(P(y|x))": "-10", "log(Q(y|a,x))": -9}
    return {"from": "Assistant", "value": "r"} | logs | changes


def turn(role, **changes):
    return {"role": role, "content": "c"} | changes


BAD_ROWS = {  # name -> (row, field, what the message names)
    "unknown format": ({"question": "q"}, "", "['question']"),
    "ambiguous format": (helpsteer(turns=[]), "", "helpsteer, conversation"),
    # HelpSteer
    "prompt missing": (without("prompt"), "prompt", "missing"),
    "prompt null": (helpsteer(prompt=None), "prompt", "missing"),
    "prompt not text": (helpsteer(prompt=["p"]), "prompt", "list"),
    "prompt blank": (helpsteer(prompt=" \n"), "prompt", "empty"),
    "response missing": (without("response"), "response", "missing"),
    "response not text": (helpsteer(response=4), "response", "int"),
    "response empty": (helpsteer(response=""), "response", "empty"),
    "response of white space": (helpsteer(response=" \t\u00a0\n"), "response", "empty"),
    "half a surrogate pair": (helpsteer(response="a\ud83d"), "response", "surrogate"),
    "system not text": (helpsteer(system=1), "system", "int"),
    "no attribute": (without("helpfulness"), "helpfulness", "helpfulness, correctness"),
    "rating is text": (helpsteer(helpfulness="3"), "helpfulness", "'3'"),
    "rating is boolean": (helpsteer(helpfulness=True), "helpfulness", "True"),
    "rating is NaN": (helpsteer(helpfulness=float("nan")), "helpfulness", "nan"),
    "rating is infinite": (helpsteer(helpfulness=float("-inf")), "helpfulness", "-inf"),
    "rating too high": (helpsteer(correctness=5), "correctness", "5"),
    "rating too low": (helpsteer(verbosity=-0.5), "verbosity", "-0.5"),
    "list of ratings empty": (helpsteer(helpfulness=[]), "helpfulness", "[]"),
    "list of ratings out of range": (helpsteer(helpfulness=[3, 5]), "helpfulness", "5"),
    "rating beyond floats": (helpsteer(helpfulness=10**400), "helpfulness", "finite"),
    # Reference
    "conversations empty": (reference(), "conversations", "no turn"),
    "speaker unknown": (reference(("Bot", None)), "conversations[0].from", "'Bot'"),
    "speaker repeated": (reference(("User", None), ("User", None)), "conversations[1]", "alternate"),
    "user labelled": (reference(("User", "helpfulness:3")), "conversations[0]", "user turn"),
    "label a number": (reference(("User", None), ("Assistant", 3)), "conversations[1].label", "int"),
    "label unreadable": (
        reference(("User", None), ("Assistant", "helpfulness=3")),
        "conversations[1].label.helpfulness=3",
        "name:number",
    ),
    "label of unknown name": (
        reference(("User", None), ("Assistant", "quality:3")),
        "conversations[1].label.quality",
        "attribute",
    ),
    "label beyond range": (
        reference(("User", None), ("Assistant", "helpfulness:-1")),
        "conversations[1].label.helpfulness",
        "-1",
    ),
    "mask on the assistant": (reference(("User", None), mask="Assistant"), "mask", "assistant"),
    "mask not text": (reference(("User", None), mask=1), "mask", "int"),
    # Conversation
    "turns not a list": ({"turns": {"role": "user"}}, "turns", "dict"),
    "turn not an object": (conversation("hi"), "turns[0]", "str"),
    "role missing": (conversation({"content": "c"}), "turns[0].role", "missing"),
    "role unknown": (conversation(turn("user"), turn("bot")), "turns[1].role", "'bot'"),
    "system as a turn": (conversation(turn("system"), turn("user")), "turns[0].role", "'system'"),
    "assistant twice": (conversation(turn("assistant"), turn("assistant")), "turns[1]", "alternate"),
    "content missing": (conversation({"role": "user"}), "turns[0].content", "missing"),
    "content empty": (conversation(turn("user"), turn("assistant", content="")), "turns[1].content", "empty"),
    "unknown key in a turn": (conversation(turn("user", rating=1)), "turns[0].rating", "key"),
    "ratings a list": (conversation(turn("user"), turn("assistant", ratings=[3])), "turns[1].ratings", "list"),
    "ratings of unknown name": (
        conversation(turn("user"), turn("assistant", ratings={"funny": 1})),
        "turns[1].ratings.funny",
        "attribute",
    ),
    "ratings out of range": (
        conversation(turn("user"), turn("assistant", ratings={"coherence": 4.5})),
        "turns[1].ratings.coherence",
        "4.5",
    ),
    "prediction not finite": (
        conversation(turn("user"), turn("assistant", predicted_ratings={"coherence": float("inf")})),
        "turns[1].predicted_ratings.coherence",
        "inf",
    ),
    "user rated": (conversation(turn("user", ratings={"coherence": 4})), "turns[0]", "user turn"),
    "id not text": (conversation(turn("user"), id=[7]), "id", "list"),
    "id of a turn not text": (conversation(turn("user", id={"a": 1})), "turns[0].id", "dict"),
    # Chat formats of others
    "messages empty": (messages(), "messages", "no turn"),
    "tool role": (messages(("user", "u"), ("tool", "t")), "messages[1].role", "'tool'"),
    "tool call": (
        {"messages": [{"role": "user", "content": "u", "tool_calls": [{"id": 1}]}]},
        "messages[0].tool_calls",
        "key",
    ),
    "masked message": ({"messages": [{"role": "user", "content": "u", "weight": 0}]}, "messages[0].weight", "key"),
    "content null": (messages(("user", None)), "messages[0].content", "missing"),
    "content an image": (
        messages(("user", [{"type": "text", "text": "u"}, {"type": "image_url", "image_url": {}}])),
        "messages[0].content[1]",
        "no text",
    ),
    "content part without text": (messages(("user", [{"type": "text"}])), "messages[0].content[0].text", "missing"),
    "system only": (messages(("system", "s")), "messages", "no turn"),
    "system in the middle": (messages(("user", "u"), ("system", "s")), "messages[1]", "system after user"),
    "two system texts": (messages(("system", "s"), ("user", "u")) | {"system": "t"}, "messages[0]", "two"),
    "rating of messages beyond range": (messages(("assistant", "a")) | {"helpfulness": 7}, "helpfulness", "7"),
    "rated messages without an answer": (messages(("user", "u")) | {"helpfulness": 3}, "messages", "assistant turn"),
    "messages rated twice": (
        {"messages": [{"role": "assistant", "content": "a", "ratings": {"coherence": 1}}], "coherence": 2},
        "messages",
        "twice",
    ),
    "ShareGPT human twice": (sharegpt(("human", "a"), ("human", "b")), "conversations[1]", "alternate"),
    "ShareGPT empty answer": (sharegpt(("human", "a"), ("gpt", "")), "conversations[1].value", "empty"),
    "ShareGPT unknown speaker": (
        sharegpt(("human", "a"), ("function_call", "b")),
        "conversations[1].from",
        "'function_call'",
    ),
    "instruction empty": ({"instruction": "", "output": "o"}, "instruction", "empty"),
    "output missing": ({"instruction": "i", "input": ""}, "output", "missing"),
    "input no text": ({"instruction": "i", "input": 3, "output": "o"}, "input", "int"),
    "history": ({"instruction": "i", "output": "o", "history": [["q", "a"]]}, "history", "not read"),
    # Sampled responses with log-probabilities
    "samples and no label": (sampled(label=None), "label", "missing"),
    "samples and nothing asked for": (sampled(label=" "), "label", "empty"),
    "label of samples beyond range": (sampled(label="helpfulness:9"), "label.helpfulness", "9"),
    "prompt ends with the assistant": (
        sampled(prompt_turns=[{"from": "User", "value": "p"}, {"from": "Assistant", "value": "r"}]),
        "prompt_turns",
        "user",
    ),
    "responses missing": (sampled() | {"responses": None}, "responses", "missing"),
    "responses empty": (sampled() | {"responses": []}, "responses", "no response"),
    "response of the user": (sampled(response(**{"from": "User"})), "responses[0].from", "'User'"),
    "log-probability missing": (
        sampled(response(), response(**{"log(P(y|x))": None})),
        "responses[1].log(P(y|x))",
        "missing",
    ),
    "log-probability NaN": (sampled(response(**{"log(P(y|x))": "NaN"})), "responses[0].log(P(y|x))", "'NaN'"),
    "log-probability infinite": (
        sampled(response(**{"log(P(a|x,y))": float("-inf")})),
        "responses[0].log(P(a|x,y))",
        "-inf",
    ),
    "log-probability beyond floats": (
        sampled(response(**{"log(P(y|x))": 10**400})),
        "responses[0].log(P(y|x))",
        "finite",
    ),
    "log-probability a text": (sampled(response(**{"log(Q(y|a,x))": "low"})), "responses[0].log(Q(y|a,x))", "'low'"),
    "log-probability above 0": (sampled(response(**{"log(Q(y|a,x))": 9.5})), "responses[0].log(Q(y|a,x))", "9.5"),
    "system of a conversation not text": (conversation(turn("user"), system=[]), "system", "list"),
}

BAD_FILES = {  # name -> (file name, bytes, line, field, what the message names); a line of 0 is the whole file
    "broken JSON": ("f.jsonl", b'\n{"prompt": "a"\n', 2, "", "JSON"),
    "two objects on a line": ("f.jsonl", b"{} {}\n", 1, "", "column 4"),
    "line is a list": ("f.jsonl", b'{"prompt": 1}\n[]\n', 1, "prompt", "int"),
    "list in a list": ("f.jsonl", b"[[]]\n", 1, "", "list"),
    "line is a number": ("f.jsonl", b"17\n", 1, "", "int"),
    "key twice": ("f.jsonl", b'{"prompt": "a", "prompt": "b"}\n', 1, "prompt", "twice"),
    "key of a turn twice": ("f.jsonl", b'{"turns": [{"role": "user", "role": "user"}]}\n', 1, "role", "twice"),
    "nested too deep": ("f.jsonl", b'{"a":' * 100_000 + b"\n", 1, "", "JSON"),
    "integer too long": ("f.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}\n", 1, "", "JSON"),
    "Latin-1 JSONL": ("f.jsonl", b'{"prompt": "caf\xe9"}\n', 1, "", "0xe9"),
    "UTF-16 CSV cut short": ("f.csv", "prompt\na".encode("utf-16")[:-1], 0, "", "cannot read"),
    "Latin-1 JSON": ("f.json", b'[\n{"prompt": "caf\xe9"}]', 2, "", "0xe9"),
    "broken JSON list": ("f.json", b'[\n{},\n{"a" 1}]', 3, "", "JSON"),
    "JSON of one object": ("f.json", b'{"prompt": "a"}', 1, "response", "missing"),
    "JSON of lines": ("f.json", b"{}\n{}\n", 1, "", "[]"),
    "JSON object of lines": ("f.json", b'{\n"prompt": "a"\n}', 1, "", "JSON"),
    "JSON key twice": ("f.json", b'[{"prompt": "a", "prompt": "b"}]', 0, "prompt", "twice"),
    "JSON row no object": ("f.json", b"[3]", 1, "", "int"),
    "CSV without header": ("f.csv", b"What?,That.,3\nHow?,So.,2\n", 2, "", "['What?'"),
    "CSV empty": ("f.csv", b"", 0, "", "no row"),
    "CSV without response": ("f.csv", b"prompt,answer,verbosity\na,b,1\n", 2, "response", "missing"),
    "CSV column twice": ("f.csv", b"prompt,response,prompt\na,b,c\n", 0, "prompt", "twice"),
    "CSV cell too many": ("f.csv", b"prompt,response,verbosity\na,b,1,2\n", 2, "", "4 cells"),
    "CSV cell too few": ("f.csv", b"prompt,response,verbosity\na,b\n", 2, "", "2 cells"),
    "CSV quote open": ("f.csv", b'prompt,response,verbosity\n"a,b,1\n', 2, "", "CSV"),
    "CSV header quote open": ("f.csv", b'prompt,"response\n', 1, "", "CSV"),
    "CSV rating is text": ("f.csv", b"prompt,response,verbosity\na,b,good\n", 2, "verbosity", "'good'"),
    "CSV rating is nan": ("f.csv", b"prompt,response,verbosity\na,b,nan\n", 2, "verbosity", "nan"),
    "CSV response empty": ("f.csv", b'prompt,response,verbosity\n"x\ny",,1\n', 2, "response", "missing"),
    "Latin-1 CSV": ("f.csv", b"prompt,response,verbosity\na,caf\xe9,1\n", 2, "", "0xe9"),
    "Latin-1 CSV header": ("f.csv", b"prompt,response,\xe9\n", 1, "", "0xe9"),
    "no gzip": ("f.jsonl.gz", b"<html>\n", 1, "", "JSON"),
    "gzip cut short": ("f.jsonl.gz", gzip.compress(b"{}" * 9999, mtime=0)[:-20], 0, "", "cannot read"),
    "no Parquet": ("f.parquet", b"PAR0" * 9, 0, "", "table"),
    "empty file": ("f.jsonl", b"", 0, "", "no row"),
    "blank lines only": ("f.jsonl", b"\n \n", 0, "", "no row"),
    "empty list": ("f.json", b"[]", 0, "", "no row"),
    "Parquet cut short": ("f.parquet", b"PAR1" * 9, 0, "", "table"),
    "unknown type": ("f.xlsx", b"PK", 0, "", "'.xlsx'"),
    "no extension": ("rows", b"{}", 0, "", "''"),
}


def refusal(source, **options):
    with pytest.raises(DataError) as caught:
        load_conversations([str(source)], HELPSTEER, **options)
    return caught.value


def assert_says(error, path, line, field, fragment):
    assert (error.file, error.line, error.field) == (str(path), line, field)
    assert names(error.message, fragment)
    assert error.cure.strip()
    assert str(error).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert f"cure: {error.cure}" in str(error)


@pytest.mark.parametrize(("row", "field", "fragment"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(tmp_path, row, field, fragment):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    error = refusal(path)
    assert_says(error, path, 3, field, fragment)
    assert "on_bad_row='skip'" in error.cure

    loaded = load_conversations([str(path)], HELPSTEER, on_bad_row="skip")
    (kept,), (skipped,) = loaded.conversations, loaded.skipped
    assert (kept.line, skipped.file, skipped.line) == (1, str(path), 3)
    assert fragment in skipped.reason
    assert field in skipped.reason
    write_skipped(tmp_path / "skipped.jsonl", loaded.skipped)
    assert json.loads((tmp_path / "skipped.jsonl").read_text(encoding="utf-8"))["line"] == 3


@pytest.mark.parametrize(("name", "content", "line", "field", "fragment"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, name, content, line, field, fragment):
    path = tmp_path / name
    path.write_bytes(content)
    assert_says(refusal(path), path, line, field, fragment)
    refusal(path, on_bad_row="skip")  # none of them has a usable row


def test_parquet_column_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    columns = [pyarrow.array(["a"])] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "response", "prompt"]), path)
    assert_says(refusal(path), path, 0, "prompt", "twice")


def test_missing_file_and_folder(tmp_path):
    assert_says(refusal(tmp_path / "none.jsonl"), tmp_path / "none.jsonl", 0, "", "file")
    assert_says(refusal(tmp_path), tmp_path, 0, "", "folder")


def test_missing_sample():
    error = refusal("embedded:helpsteer3")
    assert_says(error, "embedded:helpsteer3", 0, "", "'helpsteer3'")
    assert "helpsteer2" in error.cure


def test_hub_failure(monkeypatch):
    import datasets

    def load_dataset(name, *, split):
        raise ValueError(f"Unknown split {split}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_says(refusal("hub:a/b:dev"), "hub:a/b:dev", 0, "", "Unknown split dev")


def test_a_missing_file_is_refused_before_the_first_row(tmp_path):
    with refused(DataError, str(tmp_path / "none.jsonl"), cure="embedded:NAME"):
        iter_rows(str(tmp_path / "none.jsonl"))


def test_the_cure_of_a_wrong_encoding_cures(tmp_path):
    path, new = tmp_path / "rows.jsonl", tmp_path / "new.jsonl"
    path.write_bytes(json.dumps(GOOD | {"prompt": "café"}, ensure_ascii=False).encode("windows-1252"))
    command = "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    assert command in refusal(path).cure
    subprocess.run(command.replace("FILE", str(path)).replace("NEW", str(new)), shell=True, check=True)
    assert load_conversations([str(new)], HELPSTEER).conversations[0].turns[0].content == "café"


@pytest.mark.parametrize("value", [b"x", float("nan")], ids=["bytes", "NaN"])
def test_what_json_cannot_carry_is_refused_only_where_it_is_used(tmp_path, value):
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    for field, usable in {"note": True, "prompt": False, "helpfulness": False, "id": False}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD | {field: value}]), path)
        if usable:
            assert len(load_conversations([str(path)], HELPSTEER).conversations) == 1
        else:
            assert_says(refusal(path), path, 1, field, "")
