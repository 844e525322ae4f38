"""The command: the same predictions as annotate and as the training run's own evaluation."""

import contextlib
import io
import json

import numpy as np
import pytest

from steerjax.annotate import main as annotate
from steerjax.config import default_config, resolve
from steerjax.data.loading import load_conversations, split_by_prompt
from steerjax.evaluate import main
from steerjax.report.records import read_metrics
from steerjax.schema import STEERLM
from steerjax.training.train import train
from tests.refusals import says
from tests.reward_models import read_rows, some_conversations, write_rows

SHORT = ("--row-length", "256")
NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on made-up ratings: its workdir, its own evaluation, and files of its two splits."""
    folder, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    rows = []
    for conversation in some_conversations(40, longest=12):
        row = conversation.to_json()
        for turn in row["turns"][1::2]:
            rated = [name for name in NAMES if name != "coherence" and random.random() > 0.2]
            turn["ratings"] = {name: int(random.integers(0, 5)) for name in rated} or {"verbosity": 1}
        rows.append(row)
    source = write_rows(folder / "rows.jsonl", rows)
    config = default_config()
    config.data.train, config.data.validation_fraction = (str(source),), 0.3
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=256)
    config.train.update(steps=3, plots=False)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=1)
    experiment = resolve(config.to_dict())
    evaluation = train(experiment, folder / "run")["regression"]
    conversations = load_conversations([str(source)], STEERLM).conversations
    splits = split_by_prompt(conversations, 0.3, experiment.data.split_seed)
    files = [write_rows(folder / f"{name}.jsonl", split) for name, split in zip(("train", "val"), splits, strict=True)]
    return folder / "run", evaluation, *files


def evaluate(*words) -> None:
    main([str(word) for word in words])


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as said:
        evaluate(*words)
    assert caught.value.code == 2
    return said.getvalue()


def test_attributes_equal_annotate_and_the_runs_own_evaluation(run, tmp_path, capsys):
    workdir, own, train_file, validation = run
    output = tmp_path / "report"
    evaluate("--suite", "attributes", "--model", workdir, "--data", validation, "--train-data", train_file,
             "--output", output, *SHORT)  # fmt: skip
    rows = read_rows(output / "predictions.jsonl")
    assert [row["id"] for row in rows] == list(own.detail.ids)
    assert "coherence" not in rows[0]["predicted_ratings"]  # nobody rated it
    places = [own.detail.schema.names.index(name) for name in rows[0]["predicted_ratings"]]
    found = np.array([list(row["predicted_ratings"].values()) for row in rows])
    np.testing.assert_allclose(found, own.detail.predicted[:, places], rtol=0, atol=1e-5)

    metrics = json.loads((output / "metrics.json").read_text())
    (record,) = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "validation" and r["step"] == 3]
    for name in rows[0]["predicted_ratings"]:
        for metric in ("mse", "mae", "pearson"):  # some responses are equal, and float noise ranks them
            expected = record[f"attributes/{name}/{metric}"]
            got = metrics["attributes"][name][metric]
            assert got == (None if expected is None else pytest.approx(expected, abs=1e-4)), (name, metric)
        for baseline in ("mean rating", "log length"):
            expected = own.detail.baselines[baseline][name]["mse"]
            assert metrics["baselines"][baseline][name]["mse"] == pytest.approx(expected)
    assert "mean-rating baseline" in capsys.readouterr().out
    assert (output / "predictions.png").exists()

    annotate(["--model", str(workdir), "--input", str(validation), "--output", str(tmp_path / "annotated.jsonl"),
              *SHORT])  # fmt: skip
    annotated = [
        list(turn["predicted_ratings"].values())
        for row in read_rows(tmp_path / "annotated.jsonl") for turn in row["turns"] if turn.get("ratings")
    ]  # fmt: skip
    np.testing.assert_allclose(annotated, found, rtol=0, atol=1e-5)


def test_attributes_without_training_data_and_with_rows_left_out(run, tmp_path):
    workdir, _, _, validation = run
    rows = read_rows(validation)[:4]
    rows[1]["turns"][0]["content"] = "long " * 300
    rows.append({"turns": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]})
    source = write_rows(tmp_path / "in.jsonl", rows)
    evaluate("--suite", "attributes", "--model", workdir, "--data", source, "--output", tmp_path / "out",
             *SHORT)  # fmt: skip
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["average_mse"]["mean rating"] is None
    assert metrics["skipped"] == len(rows[1]["turns"]) // 2
    assert {entry["line"] for entry in read_rows(tmp_path / "out/skipped.jsonl")} == {2}
    assert metrics["responses"] == sum(len(row["turns"]) // 2 for row in rows[:4]) - metrics["skipped"]
    unrated = write_rows(tmp_path / "unrated.jsonl", rows[-1:])
    message = refusal(
        "--suite", "attributes", "--model", workdir, "--data", unrated, "--output", tmp_path / "x", *SHORT
    )
    says(message, str(unrated), cure="helpfulness")


def test_refusals(tmp_path):
    message = refusal("--suite", "mt_bench", "--output", tmp_path / "x")
    says(message, "mt_bench", cure="steerability")
    assert "--model" in refusal("--suite", "attributes", "--output", tmp_path / "x")
    assert "--suite" in refusal("--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_help_of_a_suite(capsys):
    for words, wanted in ((("--help",), "--suite NAME"), (("--suite", "steerability", "--help"), "--reward-model")):
        with pytest.raises(SystemExit) as caught:
            evaluate(*words)
        assert caught.value.code == 0
        assert wanted in capsys.readouterr().out
