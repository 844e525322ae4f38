"""`model-index` of an exported card, through the commands, read back as the hub reads it."""

import json
import math
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from steerjax.errors import ConfigError
from steerjax.evaluate import SUITES
from steerjax.evaluate import main as evaluate
from steerjax.evaluation import model_index
from steerjax.evaluation.model_index import suite_results, validation_results
from steerjax.export import main as export
from tests.hf.test_card import PROVENANCE
from tests.hf.test_export import imported
from tests.refusals import refused, says
from tests.reward_models import reward_folder, write_rows

METRICS = {"attributes/helpfulness/mse": 0.4321, "attributes/helpfulness/kappa": None,
           "attributes/verbosity/pearson": float("nan"), "attributes/verbosity/mae": 0.25}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's checkpoint at step 7, with its metrics."""
    folder = tmp_path_factory.mktemp("index")
    config = PROVENANCE["config"] | {"objectives": ["regression"], "regression": {"weight": 1.0},
              "data": {"train": ["embedded:helpsteer"], "validation": []}}  # fmt: skip
    checkpoint = imported(reward_folder(folder / "rm", context=256), folder / "run", config=config)
    lines = ({"step": 3, "split": "validation", "loss": 9.0, "attributes/helpfulness/mse": 9.0},
             {"step": 7, "split": "validation", "loss": 0.5} | METRICS)  # fmt: skip
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checkpoint


@pytest.fixture(scope="module")
def rated(run):
    """What `evaluate --suite attributes` leaves of it."""
    rows = [{"prompt": f"p{n}", "response": "r " * (n + 1), "helpfulness": n % 5, "verbosity": n % 3} for n in range(6)]
    data, output = write_rows(run.parent.parent / "rows.jsonl", rows), run.parent.parent / "rated"
    evaluate(["--suite", "attributes", "--model", str(run), "--data", str(data), "--output", str(output)])
    return output


def test_the_card_says_what_the_run_and_the_suites_found(run, rated, tmp_path):
    export(["--checkpoint", str(run), "--output", str(tmp_path / "my-rm"), "--evaluation", str(rated)])
    card = ModelCard.load(tmp_path / "my-rm/README.md", ignore_metadata_errors=False)
    own, suite = ([r for r in card.data.eval_results if r.dataset_type == name]
                  for name in ("nvidia/HelpSteer", "rows.jsonl"))  # fmt: skip
    assert card.data.model_name == "my-rm"
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in own] == [
        ("mse", 0.4321, "held out of train"), ("mae", 0.25, "held out of train")
    ]  # fmt: skip
    figures = json.loads((rated / "results.json").read_text())["figures"]
    (found,) = (r for r in suite if r.metric_name == "MSE, helpfulness")
    assert found.metric_value == pytest.approx(figures["helpfulness/mse"]["value"], abs=1e-6)
    assert (found.metric_args["rows"], found.task_type) == (6, "text-classification")
    assert all(math.isfinite(result.metric_value) for result in card.data.eval_results)
    head = yaml.safe_load((tmp_path / "my-rm/README.md").read_text().split("---\n")[1])
    assert head["model-index"][0]["name"] == "my-rm"


def test_without_metrics_there_is_no_index(run, tmp_path):
    export(["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--scalar", "goodness"])
    assert "model-index" not in (tmp_path / "out/README.md").read_text()  # they are of other outputs


def test_refusals(run, rated, tmp_path, capsys):
    other = imported(reward_folder(tmp_path / "other", context=256), tmp_path / "run")
    with pytest.raises(SystemExit):
        export(["--checkpoint", str(other), "--output", str(tmp_path / "out"), "--evaluation", str(rated)])
    says(capsys.readouterr().err, str(rated), cure=f"evaluate --model {other}")
    with pytest.raises(SystemExit):
        export(["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--evaluation", str(tmp_path)])
    says(capsys.readouterr().err, str(tmp_path), cure="evaluate --suite")
    assert not (tmp_path / "out").exists()
    moved = shutil.copytree(rated, tmp_path / "moved")
    (moved / "rows.jsonl.settings.json").unlink()
    with refused(ConfigError, str(run), cure=f"evaluate --model {other}"):
        suite_results(moved, other)


def test_objectives_of_their_own(tmp_path):
    config = {
        "objectives": ["bradley_terry", "sft"], "data": {"train": ["a.jsonl"], "validation": ["hub:o/n/part:dev"]},
        "bradley_terry": {"train": ["/x/pairs.jsonl"], "weight": 0.1}, "sft": {"weight": 0.5, "train": []},
    }  # fmt: skip
    line = {"step": 7, "split": "validation", "loss": 1.0, "accuracy": 0.75}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = validation_results(tmp_path / "checkpoints/7", {"config": config})
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in found] == [
        ("pairs.jsonl", "held out of train", "accuracy", 0.75),
        ("o/n", "validation", "perplexity", pytest.approx(math.exp(2), abs=1e-6)),
        ("o/n", "validation", "accuracy", 0.75),
    ]
    assert validation_results(tmp_path / "checkpoints/8", {"config": config}) == []


@pytest.mark.parametrize(("suite", "figures", "expected", "dataset"), [
    ("reward_bench", ["Chat", "mean", "Chat/subset", "longer wins/mean"], ["Chat", "mean"], "allenai/reward-bench"),
    ("rm_bench", ["goodness/Overall", "goodness/chat/hard", "goodness/hard", "longer wins/Overall"],
     ["goodness/hard", "goodness/Overall"], "THU-KEG/RM-Bench"),
    ("truthfulqa", ["mc1", "mc2", "Law/mc2"], ["mc1", "mc2"], "truthfulqa/truthful_qa"),
    ("mt_bench", ["MT-Bench/average", "MT-Bench/writing"], ["MT-Bench/average"], "mt_bench"),
    ("steerability", ["wit/slope/predicted", "wit/slope/words", "steerbench/orthogonality", "cut"],
     ["predicted rating per requested point, wit", "STEERBENCH orthogonality"], "held.jsonl"),
])  # fmt: skip
def test_what_is_told_of_a_suite(suite, figures, expected, dataset, tmp_path):
    told = {name: {"value": 0.5, "count": 9, "interval": [0.4, 0.6]} for name in figures}
    said = {"suite": suite, "figures": told, "options": {"model": None, "prompts": "held.jsonl"}}
    (tmp_path / "results.json").write_text(json.dumps(said))
    found = suite_results(tmp_path, tmp_path)
    assert [result.metric_name for result in found] == expected
    assert {(r.dataset_type, r.dataset_split, r.metric_args["rows"]) for r in found} == {(dataset, "test", 9)}


def test_who_judged(tmp_path):
    """It is named; and what a reward model gives is no MT-Bench score."""
    figures = {"MT-Bench/average": {"value": 7.5, "count": 9, "interval": None}}
    said = {"suite": "mt_bench", "figures": figures, "options": {}, "judge": "gpt-4", "judged_by": "language model"}
    (tmp_path / "results.json").write_text(json.dumps(said))
    assert [r.metric_name for r in suite_results(tmp_path, tmp_path)] == ["MT-Bench/average, judged by gpt-4"]
    (tmp_path / "results.json").write_text(json.dumps(said | {"judge": "runs/rm", "judged_by": "reward model"}))
    with refused(ConfigError, str(tmp_path), "reward model", cure="--judge"):
        suite_results(tmp_path, tmp_path)


def test_every_suite_has_a_place():
    assert set(SUITES) == {*model_index._SUITES, "attributes", "steerability"}
