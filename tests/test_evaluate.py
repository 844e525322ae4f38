"""The command: the same predictions as annotate and as the training run's own evaluation."""

import contextlib
import io
import itertools
import json

import numpy as np
import pytest

from steerjax.annotate import main as annotate
from steerjax.config import default_config, resolve
from steerjax.data.loading import load_conversations, split_by_prompt
from steerjax.evaluate import main
from steerjax.evaluation import attributes
from steerjax.report.records import read_metrics
from steerjax.schema import STEERLM
from steerjax.training.train import train
from tests.refusals import says
from tests.reward_models import killed, read_rows, reward_folder, some_conversations, write_rows

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
    rows = read_rows(output / "rows.jsonl")
    assert [row["id"] for row in rows] == list(own.detail.ids)
    assert "coherence" not in rows[0]["predicted_ratings"]  # nobody rated it
    places = [own.detail.schema.names.index(name) for name in rows[0]["predicted_ratings"]]
    found = np.array([list(row["predicted_ratings"].values()) for row in rows])
    np.testing.assert_allclose(found, own.detail.predicted[:, places], rtol=0, atol=1e-5)

    metrics = json.loads((output / "results.json").read_text())
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
    metrics = json.loads((tmp_path / "out/results.json").read_text())
    assert metrics["average_mse"]["mean rating"] is None
    assert metrics["skipped"] == len(rows[1]["turns"]) // 2
    assert {entry["line"] for entry in read_rows(tmp_path / "out/skipped.jsonl")} == {2}
    assert metrics["responses"] == sum(len(row["turns"]) // 2 for row in rows[:4]) - metrics["skipped"]
    unrated = write_rows(tmp_path / "unrated.jsonl", rows[-1:])
    message = refusal(
        "--suite", "attributes", "--model", workdir, "--data", unrated, "--output", tmp_path / "x", *SHORT
    )
    says(message, str(unrated), cure="helpfulness")


def test_turns_of_threads_and_pairs(run, tmp_path):
    """A shared turn counts once, a pair's both responses; only answers to the same turns are a pair, and a row's lists
    are of its last turn."""

    def turn(role, content, **more):
        return {"role": role, "content": content} | more

    first = turn("user", "p"), turn("assistant", "one", ratings={"verbosity": 1}, id="m1")
    threads = [{"turns": [*first, turn("user", q), turn("assistant", q, ratings={"verbosity": 3})]} for q in "ab"]
    plain = [{key: each[key] for key in each if key != "id"} for each in first]
    listed = {"messages": [*plain, turn("user", "c"), turn("assistant", "c")], "verbosity": [2, 4]}
    pair = {"turns": [first[0], turn("assistant", "better", ratings={"verbosity": 4}, id="m2")],
            "rejected": [first[0], turn("assistant", "worse", ratings={"verbosity": 3}, id="m3")]}  # fmt: skip
    for name, rows in (("threads", [*threads, listed]), ("pairs", [pair, pair | {"rejected": [*first]}])):
        evaluate("--suite", "attributes", "--model", run[0], "--data", write_rows(tmp_path / f"{name}.jsonl", rows),
                 "--output", tmp_path / name, *SHORT)  # fmt: skip
    rows = read_rows(tmp_path / "threads/rows.jsonl")
    assert [(row["turn"], row["ratings"]["verbosity"], "raters" in row) for row in rows] == [
        (1, 1, False), (3, 3, False), (3, 3, False), (1, 1, False), (3, 3, True)
    ]  # fmt: skip
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("threads", "pairs")]
    assert [each["figures"]["verbosity/pairs"]["count"] for each in found] == [0, 3]
    assert "1 that several" in found[0]["summary"]["responses"]
    assert [row["ratings"]["verbosity"] for row in read_rows(tmp_path / "pairs/rows.jsonl")] == [4, 3, 1]


def test_refusals(tmp_path):
    message = refusal("--suite", "vibes", "--output", tmp_path / "x")
    says(message, "vibes", cure="steerability")
    assert "--model" in refusal("--suite", "attributes", "--output", tmp_path / "x")
    assert "--suite" in refusal("--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_help_of_a_suite(capsys):
    for words, wanted in ((("--help",), "--suite NAME"), (("--suite", "steerability", "--help"), "--reward-model")):
        with pytest.raises(SystemExit) as caught:
            evaluate(*words)
        assert caught.value.code == 0
        assert wanted in capsys.readouterr().out


def test_raters_pairs_length_and_calibration_by_hand():
    """Of six made-up responses to two prompts; one attribute that people rated several times."""
    human, predicted = [1, 2, 3, 0, 4, 4], [0.9, 2.4, 2.2, 1.0, 3.0, 3.5]
    raters = [[1, 1, 1], [2, 3, 1], [3, 3], [0], [4, 4, 4], [4, 4]]
    rows = [
        {
            "id": str(i), "prompt": "a" if i < 3 else "b", "characters": 10 * (i + 1), "ratings": {"clarity": h},
            "predicted_ratings": {"clarity": p}, "baselines": {"mean rating": {"clarity": 2.3}, "log length": {}},
            "whole": {"human": {"clarity": h}, "model": {"clarity": round(p)}, "mean rating": {"clarity": 2},
                      "log length": {}},
            "raters": {"clarity": r},
        } for i, (h, p, r) in enumerate(zip(human, predicted, raters, strict=True))
    ]  # fmt: skip
    rows.append({"id": "6", "turn": 1, "skipped": {"file": "f", "line": 7, "reason": "too long"}})
    found = attributes.measure(attributes.columns(rows))
    assert found["clarity/pairs"] == (pytest.approx(4 / 5), 5)  # 2 before 3 is wrong; 4 and 4 are no pair
    assert found["clarity/longer"] == (1.0, 5)
    assert found["clarity/bias"][0] == pytest.approx(np.mean(np.subtract(predicted, human)))
    assert found["clarity/slope"][0] == pytest.approx(np.polyfit(predicted, human, 1)[0])
    pairs = np.array([pair for r in raters for pair in itertools.permutations(r, 2)])
    assert found["clarity/people"] == (pytest.approx(cohen(*pairs.T)), len(pairs))
    pairs = np.array([(round(p), rating) for p, r in zip(predicted, raters, strict=True) for rating in r])
    assert found["clarity/model with people"] == (pytest.approx(cohen(*pairs.T)), len(pairs))
    assert found["clarity/pearson of mean rating"] == (pytest.approx(np.nan, nan_ok=True), 6)
    assert found["clarity/mse of log length"][1] == 0


def cohen(x, y):
    """Quadratic-weighted kappa from the table of counts, as scikit-learn has it."""
    observed = np.histogram2d(x, y, bins=[np.arange(-0.5, 5), np.arange(-0.5, 5)])[0]
    weights = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
    chance = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    return 1 - (weights * observed).sum() / (weights * chance).sum()


@pytest.mark.slow
def test_two_outputs_are_compared_on_their_shared_rows(run, tmp_path, capsys):
    workdir, _, train_file, validation = run
    folder = reward_folder(tmp_path / "other", context=256)
    for name, model, more in (("a", workdir, ()), ("b", folder, ("--template", "extra_id"))):
        evaluate("--suite", "attributes", "--model", model, "--data", validation, "--train-data", train_file,
                 "--output", tmp_path / name, *SHORT, *more)  # fmt: skip
    capsys.readouterr()
    evaluate("--compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")
    said = json.loads((tmp_path / "both/results.json").read_text())
    one, other = (json.loads((tmp_path / name / "results.json").read_text())["figures"] for name in "ab")
    found = said["differences"]["b"]["helpfulness/mse"]
    assert found["value"] == pytest.approx(other["helpfulness/mse"]["value"] - one["helpfulness/mse"]["value"])
    assert 0 < found["p"] <= 1
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert "helpfulness/mse" in capsys.readouterr().out
    assert (tmp_path / "both/compared.png").read_bytes().startswith(b"\x89PNG")
    for words in ((tmp_path / "a",), (tmp_path / "a", tmp_path / "a")):
        says(refusal("--compare", *words, "--output", tmp_path / "x"), "--compare", cure="A B")
    says(refusal("--compare", tmp_path / "a", tmp_path, "--output", tmp_path / "x"), str(tmp_path), cure="--suite")


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was(run, tmp_path, monkeypatch):
    workdir, _, _, validation = run
    words = ("--suite", "attributes", "--model", workdir, "--data", validation, "--output", tmp_path / "out", *SHORT)
    evaluate(*words)
    rows = (tmp_path / "out/rows.jsonl").read_bytes()
    killed(tmp_path / "out/rows.jsonl", rows[: len(rows) // 2])
    evaluate(*words)
    assert (tmp_path / "out/rows.jsonl").read_bytes() == rows
    says(refusal(*words, "--dtype", "bfloat16"), "rows.jsonl", "dtype", cure="another output")
