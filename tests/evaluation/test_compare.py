"""Outputs side by side: tables, plots of the suites' own, and what cannot be compared."""

import json

import numpy as np
import pytest

from steerjax.errors import ConfigError, DataError
from steerjax.evaluation import attributes, mt_bench
from steerjax.evaluation.attributes import WHO
from steerjax.evaluation.compare import compare
from steerjax.report.figures import figures
from tests.refusals import refused
from tests.reward_models import write_rows


def output(folder, score="MT-Bench", suite="mt_bench", better=0.0):
    """What mt_bench leaves, of 16 made-up questions that are hard or easy for every model."""
    random, rows = np.random.default_rng(3), []
    for number in range(16):
        hard, noise = random.normal(0, 2), random.normal(0, 0.1, 2)
        scores = [float(np.clip(5 + better + hard + x, 1, 10)) for x in noise]
        category = mt_bench.CATEGORIES[number % 8]
        rows.append({"question_id": number, "category": category, "scores": {score: scores}})
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {name: f.to_json() for name, f in figures(mt_bench.measure, mt_bench.columns(rows)).items()}
    said = {"suite": suite, "judge": "J", "options": {}, "figures": found}
    (folder / "results.json").write_text(json.dumps(said))
    return folder


def test_a_small_difference_on_the_same_questions_is_seen(tmp_path, capsys):
    one, other = output(tmp_path / "one"), output(tmp_path / "other", better=0.4)
    compare([one, other], tmp_path / "both")
    said = json.loads((tmp_path / "both" / "results.json").read_text())
    found = said["differences"]["other"]["MT-Bench/average"]
    assert 0.2 < found["value"] <= 0.4
    assert found["interval"][0] > 0
    assert found["p"] < 0.01
    alone = said["figures"]["one: MT-Bench/average"]["interval"]
    assert alone[1] - alone[0] > 1  # which alone would not tell them apart
    assert "MT-Bench/math" in capsys.readouterr().out
    for plot in ("compared.png", "mt_bench.png"):
        assert (tmp_path / "both" / plot).read_bytes().startswith(b"\x89PNG")


def test_rows_that_one_model_could_not_score(tmp_path):
    """They are left out of both sides, and what stands behind them is compared with itself."""
    for name, error in (("short", 1.0), ("long", 0.5)):
        rows = []
        for number in range(6):
            row = {"id": str(number), "turn": 1, "prompt": "p", "context": "p", "characters": 9}
            human, predicted = {"wit": float(number)}, {"wit": number + error}
            row |= {"ratings": human, "predicted_ratings": predicted, "baselines": {who: {} for who in WHO[1:]}}
            row["whole"] = {"human": human} | dict.fromkeys(WHO, predicted)
            rows.append({"id": "2", "turn": 1, "skipped": {}} if (name, number) == ("short", 2) else row)
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", rows)
        found = {key: [*one, None] for key, one in attributes.measure(attributes.columns(rows)).items()}
        found = {key: dict(zip(("value", "count", "interval"), one, strict=True)) for key, one in found.items()}
        said = {"suite": "attributes", "options": {}, "figures": found}
        (tmp_path / name / "results.json").write_text(json.dumps(said))
    compare([tmp_path / "short", tmp_path / "long"], tmp_path / "both")
    said = json.loads((tmp_path / "both/results.json").read_text())["differences"]["long"]
    assert said["wit/mae"]["value"] == pytest.approx(-0.5)
    assert said["wit/mae"]["interval"] == pytest.approx([-0.5, -0.5])
    assert said["wit/mae"]["count"] == 5
    assert "long: 5 rows of 6 and short's 6" in (tmp_path / "both/report.md").read_text()


@pytest.mark.short
def test_what_cannot_be_compared(tmp_path):
    one, rated = output(tmp_path / "one"), output(tmp_path / "rated", score="helpfulness")
    other = output(tmp_path / "other", suite="attributes")
    collected, nothing = output(tmp_path / "collected", suite="collect"), output(tmp_path / "nothing")
    (nothing / "results.json").write_text('{"figures": {}}')
    for folders, error, fact, cure in (
        ([one], ConfigError, "--compare", "A B"),
        ([one, one], ConfigError, "--compare", "A B"),
        ([one, other], ConfigError, "attributes, mt_bench", "one suite"),
        ([one, rated], ConfigError, "no figure", "same scores"),
        ([one, tmp_path], DataError, str(tmp_path), "--suite"),
        ([collected, one], DataError, "collected", "--suite"),
        ([one, nothing], DataError, str(nothing), "--suite"),
    ):
        with refused(error, fact, cure=cure):
            compare(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with refused(ConfigError, "--output", cure="another folder"):
        compare([one, output(tmp_path / "more")], one)
