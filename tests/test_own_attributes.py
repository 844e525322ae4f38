"""A user's own attributes, 1 to 5 and 1 to 10, from rows to a steered model, through the commands' own functions."""

import json

import numpy as np
import pytest

from steerjax import annotate, evaluate, export, generate
from steerjax.bundle import describe, open_bundle
from steerjax.config import default_config, resolve
from steerjax.data.loading import load_conversations, split_by_prompt
from steerjax.hf.config_json import read_config
from steerjax.inference.scorer import Scorer, predict
from steerjax.parallel.mesh import MeshConfig
from steerjax.report.records import read_metrics
from steerjax.schema import Attribute, Schema
from steerjax.training.train import train
from tests.refusals import says
from tests.reward_models import SENTENCE, read_rows, write_rows

SCHEMA = Schema((Attribute("wit", 1, 5, "how funny"), Attribute("depth", 1, 10)))
RANGES = {"wit": [1.0, 5.0], "depth": [1.0, 10.0]}


def recipe(**groups):
    """A tiny model that learns these attributes; a group's changes by its name."""
    config = default_config()
    config.data.update(attributes=(("wit", 1, 5, "how funny"), ("depth", 1, 10)), validation_fraction=0.25)
    config.model.update(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
    config.batch.update(rows=8, row_length=128)
    config.compute.update(attention_chunk=32)
    config.train.update(steps=4, plots=False)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=1)
    for name, changes in groups.items():
        config[name].update(changes)
    return config


def command(module, *arguments: object) -> None:
    module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows as a user has them: `prompt`, `response` and a column for each attribute; some lack a rating."""
    folder = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)

    def words() -> str:
        return " ".join(random.choice(SENTENCE.split(), random.integers(2, 12)))

    rows = [
        {"prompt": f"Question {number // 3}?", "response": words(), "wit": int(random.integers(1, 6)),
         "depth": [int(random.integers(1, 11)), None][number % 7 == 0]}
        for number in range(48)
    ]  # fmt: skip
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "unrated.jsonl", [{key: row[key] for key in ("prompt", "response")} for row in rows])
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Question {number}?"} for number in range(2)])
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    """A trained reward model: its run and its export."""
    config = recipe(data={"train": (str(folder / "rows.jsonl"),)}, train={"plots": True})
    train(resolve(config.to_dict()), folder / "rm")
    command(export, "--checkpoint", folder / "rm", "--output", folder / "judge")
    return folder / "judge"


@pytest.fixture(scope="module")
def annotated(folder, reward):
    """The unrated rows with the model's ratings."""
    arguments = ("--input", folder / "unrated.jsonl", "--model")
    command(annotate, *arguments, reward, "--output", folder / "annotated.jsonl")
    command(annotate, *arguments, folder / "rm", "--output", folder / "by_run.jsonl")
    return folder / "annotated.jsonl"


@pytest.fixture(scope="module")
def chat(folder, annotated):
    """A chat model that learnt to answer to these labels: its export."""
    chosen = {"ratings": "predicted", "default_ratings": {"depth": 10.0}}
    config = recipe(data={"train": (str(annotated),)}, sft=chosen)
    config.objectives = ("sft",)
    train(resolve(config.to_dict()), folder / "sft")
    command(export, "--checkpoint", folder / "sft", "--output", folder / "chat")
    return folder / "chat"


def test_a_reward_model(folder, reward):
    """Ranges of its own in metrics, report, config, card and template; the export is the run."""
    last = read_metrics(folder / "rm" / "metrics.jsonl")[-1]
    assert {key.split("/")[1] for key in last if key.startswith("attributes/")} == {"wit", "depth"}
    assert last["attributes/wit/mae"] < 5
    assert list((folder / "rm" / "report").glob("*.png"))
    run, out = open_bundle(folder / "rm"), open_bundle(reward)
    assert run.description.schema == out.description.schema == SCHEMA
    assert run.description.provenance["rated_attributes"] == ("wit", "depth")
    np.testing.assert_array_equal(out.params["reward_head"], run.params["reward_head"])
    assert out.params["reward_head"].shape == (32, 2)
    assert read_config(reward).labels == ("wit", "depth")
    assert json.loads((reward / "config.json").read_text())["id2label"] == {"0": "wit", "1": "depth"}
    assert "| 0 | wit | 1 to 5 | how funny |" in (reward / "README.md").read_text()


def test_a_run_rates_as_it_was_evaluated(folder, reward):
    """The scorer's ratings of the held-out rows have the errors that training's last evaluation wrote down."""
    last = read_metrics(folder / "rm" / "metrics.jsonl")[-1]
    held_out = split_by_prompt(load_conversations([str(folder / "rows.jsonl")], SCHEMA).conversations, 0.25, 0)[1]
    for model in (folder / "rm", reward):
        scorer = Scorer(open_bundle(model, MeshConfig(fsdp=2, tensor=2)))
        examples, predicted, _ = predict(scorer, held_out, [[1]] * len(held_out), skip=False)
        assert len(examples) == len(held_out) > 8
        rated = [[c.turns[1].ratings.get(name, np.nan) for name in SCHEMA.names] for c in held_out]
        errors = np.nanmean(np.square(predicted - rated), axis=0)
        np.testing.assert_allclose(errors, [last[f"attributes/{name}/mse"] for name in SCHEMA.names], rtol=1e-4)


def test_annotating(folder, annotated):
    rows = read_rows(annotated)
    assert rows == read_rows(folder / "by_run.jsonl")
    assert len(rows) == 48
    for row in rows:
        said = row["turns"][1]
        assert list(said["predicted_ratings"]) == ["wit", "depth"]
        label = {name: int(value) for name, value in (part.split(":") for part in said["predicted_label"].split(","))}
        for name, (low, high) in RANGES.items():
            assert label[name] == round(min(high, max(low, said["predicted_ratings"][name])))


def test_a_chat_model(chat):
    about = describe(chat)
    assert (about.kind, about.schema, about.default_ratings) == ("chat", SCHEMA, {"depth": 10.0})
    template = (chat / "chat_template.jinja").read_text()
    assert '"wit": [1, 5' in template
    assert '"depth": [1, 10' in template


@pytest.mark.slow
def test_steering_and_its_measure(folder, chat, reward, capsys):
    """Sweeps over the attributes' own ranges, rated by the judge, measured and plotted."""
    answers, rated, measured = folder / "answers.jsonl", folder / "rated.jsonl", folder / "measured"
    options = ("--model", chat, "--input", folder / "prompts.jsonl", "--output", answers, "--temperature", 1)
    command(generate, *options, "--sweep", "wit", "--sweep", "depth=1,10", "--batch-size", 20, "--max-new-tokens", 8)
    asked = [row["generation"]["attributes"] for row in read_rows(answers)]
    assert asked == 2 * [{"wit": wit, "depth": depth} for wit in range(1, 6) for depth in (1, 10)]
    command(annotate, "--model", reward, "--input", answers, "--output", rated, "--on-bad-row", "skip")
    command(evaluate, "--suite", "steerability", "--input", rated, "--model", chat, "--output", measured)
    found = json.loads((measured / "results.json").read_text())
    assert found["ranges"] == RANGES
    assert found["attributes"]["wit"]["levels"] == [1, 2, 3, 4, 5]
    assert set(found["goal_space"]) == set(RANGES)
    assert {path.name for path in measured.glob("*.png")} == {"curves.png", "leakage.png", "obtained.png"}
    capsys.readouterr()
    for arguments, facts in (
        (("--attributes", "wit=6"), ("wit", "6", "1..5")),
        (("--attributes", "humor=1"), ("humor",)),
        (("--sweep", "depth=0..10"), ("depth", "0", "1..10")),
    ):
        with pytest.raises(SystemExit):
            command(generate, "--model", chat, "--prompt", "Hi", *arguments)
        says(capsys.readouterr().err, arguments[0], *facts)


def test_evaluating_a_reward_model(folder, reward):
    options = ("--model", reward, "--data", folder / "rows.jsonl", "--output", folder / "attributes")
    command(evaluate, "--suite", "attributes", *options)
    text = (folder / "attributes" / "results.json").read_text()
    assert '"wit"' in text
    assert '"depth"' in text
    assert "helpfulness" not in text
