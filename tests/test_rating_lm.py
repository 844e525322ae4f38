"""A language model that rates, through the commands' own functions: the files are a reward model's."""

import json

import numpy as np
import pytest

import steerjax
from steerjax import annotate, evaluate, export
from steerjax.config import resolve
from steerjax.report.records import read_metrics
from steerjax.training.train import train
from tests.reward_models import read_rows, write_rows
from tests.test_own_attributes import command, recipe

SAYS = {"good": (5, 10), "bad": (1, 2)}  # a response's word -> wit, depth


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rating")
    rows = [
        {"prompt": f"Question {number}?", "response": f"{word} answer", "wit": wit, "depth": depth}
        for number in range(16)
        for word, (wit, depth) in SAYS.items()
    ]
    write_rows(folder / "rows.jsonl", rows)
    config = recipe(
        data={"train": (str(folder / "rows.jsonl"),)},
        model={"initializer_range": 0.1},
        train={"steps": 100, "evaluate_every": 50, "plots": True},
        optimizer={"learning_rate": 1e-2},
    )
    config.objectives = ("attribute_lm", "sft")
    train(resolve(config.to_dict()), folder / "run")
    command(export, "--checkpoint", folder / "run", "--output", folder / "out")
    return folder


def test_training_reports_the_label_lines(folder):
    records = [record for record in read_metrics(folder / "run" / "metrics.jsonl") if record["split"] == "validation"]
    assert records[-1]["attribute_lm/loss"] < min(0.1, records[0]["attribute_lm/loss"])
    assert records[-1]["label_accuracy"] > 0.95
    assert records[-1]["tokens"] < records[-1]["label_tokens"]  # the first are SFT's
    said = json.loads((folder / "out" / "steerjax.json").read_text())
    assert (said["kind"], said["provenance"]["rated_attributes"]) == ("chat", ["wit", "depth"])


def test_run_and_export_annotate_as_a_reward_model_does(folder):
    for model in ("run", "out"):
        arguments = ("--input", folder / "rows.jsonl", "--output", folder / f"{model}.jsonl")
        command(annotate, "--model", folder / model, *arguments)
    rows = read_rows(folder / "run.jsonl")
    assert rows == read_rows(folder / "out.jsonl")
    for row in rows:
        turn = row["turns"][1]
        assert list(turn) == ["role", "content", "ratings", "predicted_ratings", "predicted_label"]
        expected = SAYS[turn["content"].split()[0]]
        assert list(turn["predicted_ratings"]) == ["wit", "depth"]
        assert max(abs(np.array(list(turn["predicted_ratings"].values())) - expected)) < 1
        rounded = {name: round(rating) for name, rating in turn["predicted_ratings"].items()}
        assert turn["predicted_label"] == ",".join(f"{name}:{label}" for name, label in rounded.items())


@pytest.mark.slow
def test_it_is_evaluated_and_rates_in_python_and_still_answers(folder):
    options = ("--model", folder / "run", "--data", folder / "rows.jsonl", "--output", folder / "attributes")
    command(evaluate, "--suite", "attributes", *options)
    found = json.loads((folder / "attributes" / "results.json").read_text())["figures"]
    assert found["wit/mse"]["value"] < 1
    model = steerjax.load(folder / "out")
    good, bad = model.rate("Question 1?", ["good answer", "bad answer"])
    assert min(good[name] - bad[name] for name in ("wit", "depth")) > 2
    answer = model.generate("Question 1?", {"wit": 5, "depth": 10}, max_new_tokens=16)
    assert answer.split() == ["good", "answer"]
