"""Data sets as they lie on the hub: which objective learns from which, and what is said where one does not."""

import json

import pytest

from steerjax.chat.render import Renderer
from steerjax.chat.templates import TEMPLATES
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.config import default_config, resolve
from steerjax.errors import DataError
from steerjax.objectives import Setting, find_objective
from steerjax.prepare import main as prepare
from steerjax.training.input import Input, load_parts, make_input
from tests.refusals import refused


def turns(question, answer, **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | more]


LAYOUTS = {
    "explicit": lambda n: {"prompt": f"q{n}", "chosen": "a", "rejected": "b"},
    "implicit": lambda n: {"chosen": turns(f"q{n}", "a"), "rejected": turns(f"q{n}", "b")},
    "scored": lambda n: {"prompt": f"q{n}", "chosen": "a", "rejected": "b", "score_chosen": 9.0, "score_rejected": 2.0},
    "messages": lambda n: {"messages": turns(f"q{n}", "a")},
    "stars": lambda n: {"messages": turns(f"q{n}", "a"), "stars": 3},
    "beside turns": lambda n: {"turns": turns(f"q{n}", "a"), "verbosity": 3},
    "other columns": lambda n: {"prompt": f"q{n}", "response": "a", "stars": 3},
    "completion": lambda n: {"prompt": f"q{n}", "completion": "a"},
    "completion of messages": lambda n: {"prompt": turns(f"q{n}", "a")[:1], "completion": turns(f"q{n}", "a")[1:]},
    "rated completion": lambda n: {"prompt": f"q{n}", "completion": "a", "verbosity": 3},
    "text": lambda n: {"text": f"q{n}"},
    "rated": lambda n: {"prompt": f"q{n // 2}", "response": "ab"[n % 2], "verbosity": n % 5},
    "rated messages": lambda n: {"messages": turns(f"q{n}", "a"), "verbosity": 3},
    "sampled": lambda n: {"prompt_turns": [{"from": "User", "value": f"q{n}"}], "label": "verbosity:3", "responses": [
        {"from": "Assistant", "value": "ab"[i], "log(P(a|x,y))": -i, "log(P(y|x))": -3, "log(Q(y|a,x))": -4}
        for i in range(2)
    ]},
    "rated turns": lambda n: {"turns": turns(f"q{n}", "a", ratings={"verbosity": 3})},
}  # fmt: skip


def experiment(source, *objectives, attributes=()):
    config = default_config()
    config.objectives, config.data.train, config.data.attributes = objectives, (str(source),), attributes
    return resolve(config.to_dict())


def read(source, *objectives, **options) -> Input:
    e = experiment(source, *objectives, **options)
    schema = e.data.make_schema()
    renderer = Renderer(load_tokenizer("embedded"), TEMPLATES["extra_id"], schema)
    learners = [find_objective(name)(config, Setting(schema, renderer)) for name, config in e.objective.items()]
    return make_input(e, learners, renderer)


def written(folder, layout):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(LAYOUTS[layout](n)) + "\n" for n in range(8)))
    return path


@pytest.mark.parametrize(("layout", "objective"), [
    ("explicit", "bradley_terry"), ("implicit", "bradley_terry"), ("scored", "bradley_terry"), ("rated", "regression"),
    ("rated messages", "regression"), ("rated turns", "regression"), ("rated turns", "sft"),
    ("rated completion", "regression"), ("rated completion", "sft"), ("sampled", "steerlm2"),
])  # fmt: skip
def test_what_an_objective_learns_from(layout, objective, tmp_path):
    found = read(written(tmp_path, layout), objective)
    assert found.validation
    expected = "score_chosen, score_rejected" if layout == "scored" else ""
    assert found.said.get("not read", "").partition(":")[0] == expected


@pytest.mark.parametrize(("layout", "objective", "facts", "cure"), [
    ("explicit", "regression", ["pairs without ratings"], "bradley_terry"),
    ("implicit", "regression", ["pairs without ratings"], "bradley_terry"),
    ("scored", "regression", ["score_chosen"], "bradley_terry"),
    ("messages", "regression", ["no rated response"], "beside messages"),
    ("stars", "regression", ["stars"], "config.data.attributes"),
    ("beside turns", "regression", ["verbosity"], "in a turn's 'ratings'"),
    ("other columns", "regression", ["rows.jsonl:1"], "stars"),
    ("messages", "bradley_terry", ["no pair"], "chosen"),
    ("rated", "bradley_terry", ["with ratings"], "prepare --pairs"),
    ("rated", "bradley_terry", ["with ratings"], "config.objectives=('regression',)"),
    ("messages", "sft", ["no label"], "annotate"),
    ("completion", "sft", ["no label"], "annotate"),
    ("completion of messages", "regression", ["no rated response"], "beside"),
    ("sampled", "sft", ["rows.jsonl:1", "sampled responses"], "config.objectives=('steerlm2',)"),
    ("sampled", "regression", ["rows.jsonl:1", "sampled responses"], "config.objectives=('steerlm2',)"),
    ("rated turns", "steerlm2", ["rows.jsonl:1", "no sampled responses"], "steerlm2"),
    ("text", "sft", ["rows.jsonl:1", "text"], "prompt and response"),
])  # fmt: skip
def test_what_is_said_where_it_does_not(layout, objective, facts, cure, tmp_path):
    with refused(DataError, *facts, cure=cure):
        read(written(tmp_path, layout), objective)


def test_the_cures_cure(tmp_path):
    stars = written(tmp_path, "stars")
    assert "not read" not in read(stars, "regression", attributes=(("stars", 1, 5),)).said
    rated = written(tmp_path, "rated")
    prepare(["helpsteer", "--input", str(rated), "--output", str(tmp_path / "pairs.jsonl"), "--pairs", "verbosity"])
    assert read(tmp_path / "pairs.jsonl", "bradley_terry").validation


def test_the_data_is_read_once(tmp_path, monkeypatch):
    """At start-up a hub data set, or a large file, is not opened again to look for columns."""
    opened = []
    monkeypatch.setattr("steerjax.data.readers._FILE_READERS", {".jsonl": lambda file: opened.append(file) or iter(
        (n + 1, LAYOUTS["stars"](n) | {"verbosity": 1}) for n in range(8)
    )})  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.touch()
    _, _, said = load_parts(experiment(path, "regression"))
    assert said["not read"].startswith("stars: ")
    assert len(opened) == 1
