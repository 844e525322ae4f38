"""Data of an objective's own: what it learns from, what it shares, and what is held out."""

import json

import pytest

from steerjax.chat.render import Renderer, make_renderer
from steerjax.config import default_config, resolve
from steerjax.errors import CheckpointError, ConfigError, DataError
from steerjax.objectives import predicted_schema
from steerjax.report.records import read_metrics
from steerjax.training.input import load_parts, make_input
from steerjax.training.program import make_objectives
from steerjax.training.source import with_source
from steerjax.training.train import train
from tests.refusals import refused

BOTH = ("regression", "bradley_terry")


@pytest.fixture
def files(tmp_path):
    """Ratings of 40 prompts, pairs of 30 of these and of 10 more, one response of a pair being the rated one."""
    ratings = [{"prompt": f"Question {i}?", "response": "good " * (i % 4 + 1), "helpfulness": i % 4} for i in range(40)]
    pairs = [
        {"prompt": f"Question {i}?", "chosen": "good " * (i % 4 + 1), "rejected": "bad " * (i % 3 + 1)}
        for i in range(10, 50)
    ]
    for name, rows in (("ratings", ratings), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def experiment(files, objectives=BOTH, **changes):
    config = default_config()
    config.objectives = objectives
    config.data.train = (str(files / "ratings.jsonl"),)
    config.data.validation_fraction = 0.25
    config.bradley_terry.train = (str(files / "pairs.jsonl"),)
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    config.batch.update(rows=8, row_length=128)
    config.optimizer.warmup_steps = 0
    config.train.update(steps=3, plots=False)
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(config[group], name, value)
    return resolve(config.to_dict())


def inputs(e):
    schema = predicted_schema(e.objective, e.data.make_schema())
    e, _ = with_source(e)
    renderer = make_renderer(e.chat, schema)
    return make_input(e, make_objectives(e, schema, renderer), renderer)


def counted(trees):
    return [sum(x.objective == name for tree in trees for x in tree.examples) for name in BOTH]


@pytest.mark.short
def test_each_objective_learns_from_its_own_file_and_prompts_are_computed_once(files):
    found = inputs(experiment(files))
    train, validation = counted(found.plan.trees), counted(found.validation)
    assert [a + b for a, b in zip(train, validation, strict=True)] == [40, 2 * 40]
    assert len(found.plan.trees) + len(found.validation) == 50  # a tree a prompt, in both files or one
    assert len(found.validation) == round(0.25 * 50)  # held out together
    assert any({x.objective for x in tree.examples} == set(BOTH) for tree in found.plan.trees)


@pytest.mark.short
def test_files_with_validation_of_their_own_and_without(files):
    e = experiment(files, bradley_terry__validation=(str(files / "pairs.jsonl"),))
    parts, _, said = load_parts(e)
    assert [tuple(map(len, part.splits)) for part in parts] == [(30, 10), (40, 40)]
    assert "40 prompts" in said["warning"]
    alone, _, _ = load_parts(experiment(files, ("bradley_terry",)))
    assert [(part.objectives, sum(map(len, part.splits))) for part in alone] == [(["bradley_terry"], 40)]


@pytest.mark.slow
def test_a_run_with_two_files_resumes_and_knows_them_both(files, tmp_path):
    train(experiment(files), tmp_path / "run")
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert all(r["regression/loss"] > 0 and r["bradley_terry/loss"] > 0 for r in records)
    pairs = files / "pairs.jsonl"
    pairs.write_text(pairs.read_text() + json.dumps({"prompt": "More?", "chosen": "yes", "rejected": "no"}) + "\n")
    with refused(CheckpointError, "pairs.jsonl", cure="accept_changes"):
        train(experiment(files, train__steps=4), tmp_path / "run")


def test_a_row_that_one_objective_cannot_use_is_the_others(files):
    """Whichever comes first; a pair whose rejected response is too long is still a rated response."""
    path, rows = files / "both.jsonl", []
    for i in range(9):
        asked, answer = {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}
        turns = [asked, answer | {"ratings": {"helpfulness": 4}}]
        rows.append({"turns": turns, "rejected": [asked, answer | {"content": "no " * (300 if i == 8 else 1)}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for objectives in (BOTH, BOTH[::-1]):
        options = {"data__train": (str(path),), "bradley_terry__train": (), "data__on_bad_row": "skip"}
        found = inputs(experiment(files, objectives, **options))
        assert [(row.line, row.reason.split(":")[0]) for row in found.skipped] == [(9, "bradley_terry")]
        counts = [counted(trees) for trees in (found.plan.trees, found.validation)]
        assert [a + b for a, b in zip(*counts, strict=True)] == [9, 2 * 8]


@pytest.mark.short
def test_a_text_whose_control_string_cannot_be_broken_is_a_bad_row(files, monkeypatch):
    def broken(renderer, conversation):
        if conversation.line == 3:
            raise DataError("holds a control string", cure="none")
        return 0

    monkeypatch.setattr(Renderer, "broken", broken)
    with refused(DataError, "ratings.jsonl:3"):
        inputs(experiment(files, ("regression",)))
    found = inputs(experiment(files, ("regression",), data__on_bad_row="skip"))
    assert [(row.line, row.reason) for row in found.skipped] == [(3, "holds a control string")]


@pytest.mark.short
def test_validation_without_training_data_is_refused(files):
    for key, value in (("validation", ("pairs.jsonl",)), ("format", "preference")):
        with refused(ConfigError, "config.regression", cure="train"):
            experiment(files, **{f"regression__{key}": value})


@pytest.mark.short
def test_columns_of_numbers_that_nobody_reads_are_named(files):
    """They may be ratings under another name."""
    rows = [
        {"prompt": f"Q{i}?", "response": "r", "helpfulness": 1, "clarity": 3, "depth": [1, 2], "id": i, "margin": 2,
         "kind": "x", "checked": True} for i in range(9)
    ]  # fmt: skip
    (files / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, said = load_parts(experiment(files, ("regression",)))
    assert said["not read"].startswith("clarity, depth: ")
    own = experiment(files, ("regression",), data__attributes=(("clarity", 0, 4), ("depth", 0, 4)))
    assert load_parts(own)[2]["not read"].startswith("helpfulness: ")
    assert "not read" not in load_parts(experiment(files, ("bradley_terry",)))[2]
