"""The command from raw files to prepared ones: what is written, printed, refused, and left behind."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steerjax.chat.labels import label_line
from steerjax.data.loading import load_conversations, split_by_prompt
from steerjax.prepare import main
from steerjax.schema import HELPSTEER, STEERLM
from tests import needs_shared
from tests.refusals import says

HELPSTEER_ROW = {"prompt": "p", "response": "grün", "helpfulness": 4, "verbosity": 2}
TREE = {
    "prompt": {
        "message_id": "m", "role": "prompter", "text": "p", "lang": "en", "replies": [
            {"message_id": "n", "role": "assistant", "text": "r", "lang": "en", "replies": [],
             "labels": {"quality": {"value": 0.5}}}]}
}  # fmt: skip
ROWS = {  # SOURCE -> one row
    "helpsteer": HELPSTEER_ROW,
    "helpsteer2": HELPSTEER_ROW | {"helpfulness": [4, 3]},
    "oasst": TREE,
    "reference": {
        "conversations": [{"from": "User", "value": "p"}, {"from": "Assistant", "value": "r", "label": "humor:1"}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]},
    "messages": {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
    "alpaca": {"instruction": "p", "input": "", "output": "r"},
    "completion": {"prompt": "p", "completion": "r"},
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(source, *inputs, output, **options):
    arguments = [source, "--output", str(output)]
    for path in inputs:
        arguments += ["--input", str(path)]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    main(arguments)


def refusal(capsys, *arguments, **options):
    with pytest.raises(SystemExit) as caught:
        prepare(*arguments, **options)
    assert caught.value.code == 2
    return capsys.readouterr().err


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("source", ROWS)
def test_every_source(tmp_path, source, capsys):
    output = tmp_path / "out/rows.jsonl"
    prepare(source, write(tmp_path / "in.jsonl", ROWS[source]), output=output, statistics=tmp_path / "s.json")
    (row,) = lines(output)
    assert row["turns"][0] == {"role": "user", "content": "p"} | ({"id": "m"} if source == "oasst" else {})
    rated = {"helpsteer": {"helpfulness": 4, "verbosity": 2}, "helpsteer2": {"helpfulness": 3.5, "verbosity": 2},
             "oasst": {"quality": 2}, "reference": {"humor": 1}}  # fmt: skip
    assert row["turns"][1].get("ratings") == rated.get(source)
    (again,) = load_conversations([str(output)], STEERLM).conversations
    assert again.to_json() == row
    statistics = json.loads((tmp_path / "s.json").read_text())
    assert (statistics["rows"], statistics["skipped"], statistics["dropped"]) == (1, 0, {})
    assert "1 rows in" in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == ["rows.jsonl"]


def test_text_is_written_as_it_is(tmp_path):
    output = tmp_path / "out.jsonl.gz"
    prepare("helpsteer", write(tmp_path / "in.jsonl", HELPSTEER_ROW), output=output)
    first = output.read_bytes()
    assert "grün" in gzip.decompress(first).decode("utf-8")
    prepare("helpsteer", tmp_path / "in.jsonl", output=output)
    assert output.read_bytes() == first


def test_embedded_sample_and_its_statistics(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    prepare("helpsteer", "embedded:helpsteer", output=output, statistics=tmp_path / "s.json")
    expected = load_conversations(["embedded:helpsteer"], HELPSTEER).conversations
    assert lines(output) == [conversation.to_json() for conversation in expected]
    statistics = json.loads((tmp_path / "s.json").read_text())
    counts = [statistics[name] for name in ("rows", "turns", "assistant_turns", "rated_turns")]
    assert counts == [429, 858, 429, 429]
    assert statistics["duplicates"] == 24
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["helpfulness", "429", "2.9161", "0.9019"] in printed


def test_own_attributes_and_one_prompt(tmp_path):
    rows = [{"prompt": "Write.", "response": f"essay {n}", "clarity": n % 5 + 1, "depth": 10} for n in range(20)]
    path, train, validation = write(tmp_path / "in.jsonl", *rows), tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    hold_out = ["--validation-output", str(validation), "--validation-fraction", "0.25"]
    own = ["--attribute", "clarity", "1", "5", "--attribute", "depth", "1", "10"]
    main(["helpsteer", "--input", path, "--output", str(train), *hold_out, *own])
    assert (len(lines(train)), len(lines(validation))) == (15, 5)
    assert lines(train)[0]["turns"][1]["ratings"].keys() == {"clarity", "depth"}


def test_own_attributes_that_are_none(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", HELPSTEER_ROW)
    for low in ("one", "9"):
        with pytest.raises(SystemExit):
            main(["helpsteer", "--input", path, "--output", "x.jsonl", "--attribute", "clarity", low, "5"])
        says(capsys.readouterr().err, "clarity")


def test_reference_golden_files(tmp_path):
    golden = needs_shared("data/nemo_aligner/dummy-sft.jsonl")
    prepare("reference", golden, output=tmp_path / "sft.jsonl")
    label = functools.partial(label_line, schema=STEERLM, form="numbers")
    for row, source in zip(lines(tmp_path / "sft.jsonl"), lines(golden), strict=True):
        assert row["system"] == source["system"]
        entries = [
            (t["role"].capitalize(), t["content"], label(t["ratings"]) if "ratings" in t else None)
            for t in row["turns"]
        ]
        assert entries == [(e["from"], e["value"], e.get("label")) for e in source["conversations"]]


def test_real_alpaca(tmp_path):
    alpaca = needs_shared("data/chat/alpaca_400.json")
    prepare("alpaca", alpaca, output=tmp_path / "a.jsonl")
    rows = json.loads(alpaca.read_text(encoding="utf-8"))
    expected = [(f"{row['instruction']}\n{row['input']}".removesuffix("\n"), row["output"]) for row in rows]
    assert [tuple(turn["content"] for turn in row["turns"]) for row in lines(tmp_path / "a.jsonl")] == expected


def test_hold_out_is_the_split_of_training(tmp_path, capsys):
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl.gz"
    prepare("helpsteer", "embedded:helpsteer", output=train, validation_output=validation, validation_fraction=0.1,
            seed=3)  # fmt: skip
    rows = load_conversations(["embedded:helpsteer"], HELPSTEER).conversations
    expected = [[conversation.to_json() for conversation in part] for part in split_by_prompt(rows, 0.1, 3)]
    held_out = [json.loads(line) for line in gzip.decompress(validation.read_bytes()).decode().splitlines()]
    assert [lines(train), held_out] == expected
    assert f"{len(held_out)} rows in {validation}" in capsys.readouterr().out


def test_hold_out_keeps_a_tree_on_one_side(tmp_path):
    def numbered(node, n):
        return {**node, "message_id": f"{node['message_id']}{n}", "text": f"{node['text']} {n}",
                "replies": [numbered(reply, n) for reply in node["replies"] * 2]}  # fmt: skip

    trees = [{"prompt": numbered(TREE["prompt"], n)} for n in range(20)]
    for n, tree in enumerate(trees):
        tree["prompt"]["replies"][1]["text"] = f"other {n}"
    parts = tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    prepare("oasst", write(tmp_path / "in.jsonl", *trees), output=parts[0], validation_output=parts[1],
            validation_fraction=0.25)  # fmt: skip
    train, validation = ({row["turns"][0]["content"] for row in lines(part)} for part in parts)
    assert (len(train), len(validation), train & validation) == (15, 5, set())


def test_bad_rows_and_duplicates(tmp_path, capsys):
    bad = HELPSTEER_ROW | {"helpfulness": 9}
    path = write(tmp_path / "in.jsonl", HELPSTEER_ROW, bad, HELPSTEER_ROW)
    output = tmp_path / "out.jsonl"
    message = refusal(capsys, "helpsteer", path, output=output)
    says(message, f"error: {path}:2", "helpfulness", "9", "0..4")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]

    prepare("helpsteer", path, output=output, on_bad_row="skip", on_duplicate="skip")
    assert len(lines(output)) == 1
    listing = tmp_path / "out.jsonl.skipped.jsonl"
    assert [(row["line"], row["reason"][:12]) for row in lines(listing)] == [(2, "field 'helpf"), (3, "duplicate of")]
    assert f"2 rows skipped, listed in {listing}" in capsys.readouterr().out
    prepare("helpsteer", write(tmp_path / "good.jsonl", HELPSTEER_ROW), output=output)
    assert not listing.exists()  # of the run before


def test_dropped_messages_are_counted_and_explained(tmp_path, capsys):
    alone = {"message_id": "x", "role": "prompter", "text": "alone", "lang": "en", "replies": []}
    path, output = write(tmp_path / "in.jsonl", TREE, alone), tmp_path / "out.jsonl"
    prepare("oasst", path, output=output)
    assert len(lines(output)) == 1
    assert "threads of one message: 1" in capsys.readouterr().out
    message = refusal(capsys, "oasst", path, output=tmp_path / "none.jsonl", lang="de")
    says(message, path, "2", "de", cure="--lang")


@pytest.mark.parametrize("source", ROWS)
def test_a_refusal_names_file_and_line(tmp_path, source, capsys):
    path = write(tmp_path / "in.jsonl", ROWS[source], {"x": 1})
    message = refusal(capsys, source, path, output=tmp_path / "out.jsonl")
    says(message, f"error: {path}:2")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("source", "options", "facts"),
    [
        ("helpsteer", {"lang": "en"}, ["--lang"]),
        ("helpsteer", {"keep_deleted": True}, ["--keep-deleted"]),
        ("oasst", {"schema": "helpsteer"}, ["oasst", "steerlm"]),
        ("helpsteer", {"validation_fraction": 0.1}, ["--validation-fraction", "--validation-output"]),
        ("helpsteer", {"validation_fraction": 1.5, "validation_output": "v.jsonl"}, ["fraction", "1.5"]),
        ("helpsteer", {"validation_fraction": 0.5, "validation_output": "v.jsonl"}, ["training", "1 prompts"]),
        ("helpsteer", {"statistics": "out.jsonl"}, ["out.jsonl"]),
        ("helpsteer", {"statistics": "in.jsonl"}, ["in.jsonl"]),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, source, options, facts):
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), ROWS[source])
    says(refusal(capsys, source, "in.jsonl", output="out.jsonl", **options), *facts)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_input_or_output_that_cannot_be(tmp_path, capsys):
    says(
        refusal(capsys, "alpaca", tmp_path / "none.jsonl", output=tmp_path / "out.jsonl"), str(tmp_path / "none.jsonl")
    )
    path = write(tmp_path / "in.jsonl", ROWS["alpaca"])
    for output in (tmp_path / "in.jsonl/out.jsonl", tmp_path):
        says(refusal(capsys, "alpaca", path, output=output), str(output))
    with pytest.raises(SystemExit):
        main(["webgpt", "--input", path, "--output", "x.jsonl"])
    assert "helpsteer2" in capsys.readouterr().err


KILLED = """
import os, signal
from steerjax.data import conversation
from steerjax.prepare import main
write, rows = conversation.Conversation.to_json, []
def to_json(self):
    rows.append(0)
    if len(rows) == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self)
conversation.Conversation.to_json = to_json
main()
"""


def test_killed_half_way(tmp_path, repository):
    output = tmp_path / "out.jsonl"
    arguments = ["helpsteer", "--input", "embedded:helpsteer", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {".out.jsonl.partial", ".out.jsonl.lock"}
    main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert len(lines(output)) == 429


def test_help_is_quick_and_needs_no_jax(repository):
    code = "import sys, steerjax.prepare; print({'jax', 'absl', 'datasets', 'pyarrow'} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(repository)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "set()"
