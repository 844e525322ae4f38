"""Answers -> a project whose tasks do not say where they are from."""

import json
from xml.etree import ElementTree as xml

import pytest

from steerjax.collect import main, parse_arguments, schema_of
from steerjax.collection.tasks import labelling_config, read_key
from steerjax.errors import DataError, ModelError
from steerjax.schema import HELPSTEER, Attribute, Schema
from tests.hf_folders import TINY, random_tensors, write_folder
from tests.refusals import refused, says
from tests.reward_models import read_rows, write_rows


def answers(source: str, count: int = 4, **more) -> list[dict]:
    said = [[{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"{n} by {source[-1]}"}]
            for n in range(count)]  # fmt: skip
    return [{"id": f"secret {n}", "turns": turns, "source": source, **more} for n, turns in enumerate(said)]


def project(folder, *arguments: str) -> tuple[list, dict]:
    main(["tasks", "--output", str(folder), *arguments])
    return json.loads((folder / "tasks.json").read_text()), json.loads((folder / "key.json").read_text())


def test_tasks_are_blind_shuffled_and_mapped_by_the_key(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", answers("hidden A"))
    two = write_rows(tmp_path / "two.jsonl", answers("hidden B"))
    tasks, key = project(tmp_path / "p", "--answers", str(one), "--answers", str(two))
    text = (tmp_path / "p" / "tasks.json").read_text() + (tmp_path / "p" / "labelling_config.xml").read_text()
    assert not any(word in text for word in ("hidden", "secret", "one.jsonl"))
    assert len(tasks) == len(key["tasks"]) == 8
    for task in tasks:
        data = task["data"]
        (source,) = key["tasks"][data["task"]]["sources"]
        assert data["response"] == f"{source['id'][-1]} by {source['source'][-1]}"
        assert data["dialogue"] == [{"role": "user", "content": f"Q{source['id'][-1]}"}]
    order = [task["data"]["response"] for task in tasks]
    assert order != sorted(order)
    assert order == [
        t["data"]["response"] for t in project(tmp_path / "q", "--answers", str(two), "--answers", str(one))[0]
    ]
    other = project(tmp_path / "r", "--answers", str(one), "--answers", str(two), "--seed", "1")
    assert order != [task["data"]["response"] for task in other[0]]


def test_equal_answers_are_one_task(tmp_path):
    rows = answers("A", 2) + [{**row, "source": "B"} for row in answers("A", 1)]
    tasks, key = project(tmp_path / "p", "--answers", str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert len(tasks) == 2
    assert sorted([s["source"] for s in task["sources"]] for task in key["tasks"].values()) == [["A"], ["A", "B"]]


def test_models_answer_and_an_interrupted_job_goes_on(tmp_path):
    models = []
    for seed in (0, 1):
        folder = write_folder(tmp_path / f"model{seed}", TINY, random_tensors(TINY, seed))
        about = {"kind": "chat", "template": "extra_id", "default_ratings": {"wit": 3},
                 "attributes": [{"name": "wit", "low": 1, "high": 5, "meaning": "funny"}]}  # fmt: skip
        (folder / "steerjax.json").write_text(json.dumps(about))
        models.append(str(folder))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Name a prime above {n}."} for n in range(3)])
    asked = ["--input", str(prompts), "--model", models[0], "--model", models[1], "--samples", "2"]
    asked += ["--", "--max-new-tokens", "4"]
    tasks, key = project(tmp_path / "p", *asked)
    assert [a["name"] for a in key["attributes"]] == ["wit"]  # what the model says is rated
    sources = [source for task in key["tasks"].values() for source in task["sources"]]
    assert len(sources) == 12
    assert {source["source"] for source in sources} == set(models)
    assert {source["generation"]["attributes"]["wit"] for source in sources} == {3}
    written = (tmp_path / "p" / "answers" / "model0.jsonl").stat().st_mtime_ns
    assert project(tmp_path / "p", *asked)[1] == key
    assert (tmp_path / "p" / "answers" / "model0.jsonl").stat().st_mtime_ns == written
    assert len(read_rows(tmp_path / "p" / "answers" / "model1.jsonl")) == 6
    assert len(tasks) == len(key["tasks"])


def test_options_of_generate_hold_where_the_first_model_is_asked_what_it_rates(tmp_path):
    folder = write_folder(tmp_path / "plain", TINY, random_tensors(TINY))
    given = ["tasks", "--input", "p", "--model", str(folder), "--output", "o"]
    with refused(ModelError, "template", cure="--template"):
        schema_of(parse_arguments(given))
    assert schema_of(parse_arguments([*given, "--", "--template", "extra_id"])) == HELPSTEER


@pytest.mark.parametrize(
    ("attribute", "tag", "values"),
    [
        (Attribute("a"), "Choices", ["0", "1", "2", "3", "4"]),
        (Attribute("a", -2, 2), "Choices", ["-2", "-1", "0", "1", "2"]),
        (Attribute("a", 0, 100), "Number", ("0", "100", "1")),
        (Attribute("a", -0.5, 2.5), "Number", ("-0.5", "2.5", "any")),
    ],
)
def test_control_of_an_attribute(attribute, tag, values):
    (control,) = xml.fromstring(labelling_config(Schema((attribute,)))).iter(tag)
    assert (control.get("name"), control.get("required")) == ("a", "true")
    if tag == "Choices":
        assert [choice.get("value") for choice in control] == values
    else:
        assert (control.get("min"), control.get("max"), control.get("step")) == values


def test_config_keeps_names_apart_and_keys_are_what_they_choose():
    names = ("helpfulness", "response", "dialogue", "clarity")
    schema = Schema(tuple(Attribute(name, meaning='<b> & "x"') for name in names))
    view = xml.fromstring(labelling_config(schema))
    named = [element.get("name") for element in view if element.get("name")]
    assert len(named) == len(set(named)) == 6
    assert {c.get("toName") for c in view.iter("Choices")} == {view.find("Text").get("name")}
    choices = list(view.iter("Choice"))
    keys = [choice.get("hotkey") for choice in choices]
    assert len(keys) == len(set(keys)) == 20
    assert all(choice.get("hotkey") == choice.get("value") for choice in choices[:5])  # 1 never chooses 0
    assert not any(key.isdigit() for key in keys[5:])
    assert '<b> & "x"' in view.findall("Header")[2].get("value")


def test_a_key_is_not_lost(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", answers("A"))
    key = project(tmp_path / "p", "--answers", str(rows))[1]
    assert project(tmp_path / "p", "--answers", str(rows))[1] == key
    with pytest.raises(SystemExit):
        project(tmp_path / "p", "--answers", str(rows), "--seed", "3")
    says(capsys.readouterr().err, "key.json", key["project"], cure="--output")
    assert json.loads((tmp_path / "p" / "key.json").read_text()) == key


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ([], ("--answers",)),
        (["--input", "x.jsonl"], ("--model",)),
        (["--model", "x"], ("--input",)),
        (["--answers", "prompts.jsonl"], ("prompts.jsonl", "turns")),
        (["--answers", "gone.jsonl"], ("gone.jsonl",)),
        (["--answers", "rows.jsonl", "--", "--samples", "2"], ("--model",)),
        (["--answers", "rows.jsonl", "--attribute", "clarity", "1"], ("--attribute",)),
        (["--answers", "rows.jsonl", "--attribute", "clarity", "5", "1"], ("low",)),
    ],
)
def test_what_cannot_be_made_into_tasks(tmp_path, monkeypatch, capsys, arguments, facts):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", answers("A"))
    write_rows(tmp_path / "prompts.jsonl", [{"turns": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(SystemExit) as ended:
        main(["tasks", "--output", "p", *arguments])
    assert ended.value.code == 2
    says(capsys.readouterr().err, *facts)
    assert not (tmp_path / "p" / "tasks.json").exists()


def test_a_key_that_is_none(tmp_path):
    (tmp_path / "key.json").write_text('{"project": 3}')
    with refused(DataError, "key.json"):
        read_key(tmp_path / "key.json")
