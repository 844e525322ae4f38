"""What is not finite is skipped and counted, or ends the command with a reason; no rating and no report has it."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steerjax.bundle import open_bundle
from steerjax.config import resolve
from steerjax.data.conversation import Conversation, Turn
from steerjax.errors import DataError, ModelError, TrainingError
from steerjax.inference.scorer import Scorer
from steerjax.objectives import Evaluation
from steerjax.report.records import read_metrics
from steerjax.schema import HELPSTEER, check_rating
from steerjax.training import step as step_module
from steerjax.training.train import train
from tests.faults.tiny_runs import write_recipe
from tests.refusals import refused
from tests.reward_models import reward_folder


@pytest.fixture
def experiment(tmp_path):
    """`experiment(GROUP={KEY: VALUE})`: a tiny run with these changes."""
    namespace: dict = {}
    exec(write_recipe(tmp_path).read_text(), namespace)

    def make(**changes):
        config = namespace["get_config"]().to_dict()
        config["batch"]["rows"] = 8  # a row for each of the test's devices
        return resolve(
            {name: group | changes.get(name, {}) for name, group in config.items() if isinstance(group, dict)}
        )

    return make


def checkpoints(workdir) -> list[str]:
    return [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


@pytest.mark.slow
def test_a_loss_beyond_float32_ends_even_a_short_run(experiment, tmp_path, tried):
    e = experiment(regression={"weight": 1e30}, train={"steps": 2})
    with refused(TrainingError, "2 steps in a row", "no checkpoint was saved", cure="config.optimizer.learning_rate"):
        train(e, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []
    tried("number", "loss beyond float32")


@pytest.mark.slow
def test_parameters_beyond_float32_are_not_saved(experiment, tmp_path, monkeypatch, tried):
    """The gradients are finite, and what the update makes is not."""
    monkeypatch.setattr("steerjax.training.program.make_schedule", lambda config, steps: lambda step: jnp.inf)
    for every in (1, 0):  # found by the evaluation before a save, and by the save
        with refused(TrainingError, "step 1", "finite", cure="config.optimizer.learning_rate"):
            train(experiment(train={"steps": 1, "checkpoint_every": every}), tmp_path / "run")
        assert checkpoints(tmp_path / "run") == []
        monkeypatch.setattr(
            "steerjax.training.train.Run.evaluate", lambda *_, **__: {"regression": Evaluation(0.0, {})}
        )
    tried("number", "parameters beyond float32", 2)


@pytest.mark.slow
def test_steps_that_are_skipped_are_counted_and_said(experiment, tmp_path, monkeypatch, capsys, tried):
    real = step_module.optax.tree.norm

    def norm(gradients):
        return real(gradients) * jnp.where(state_step[0] % 3 == 1, jnp.nan, 1.0)

    state_step = [0]
    make = step_module.make_train_step

    def made(*arguments, **options):
        inner = make(*arguments, **options)

        def train_step(state, batch):
            state_step[0] = state.step
            return inner(state, batch)

        return train_step

    monkeypatch.setattr(step_module.optax.tree, "norm", norm)
    monkeypatch.setattr("steerjax.training.program.make_train_step", made)
    train(experiment(), tmp_path / "run")
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert [r["bad_steps"] for r in records] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert "3 of 8" in capsys.readouterr().out
    tried("number", "gradient")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "score.weight"])
def test_weights_of_a_source(tmp_path, tried, tensor, value):
    folder = reward_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].flat[3] = value
    save_file(tensors, folder / "model.safetensors")
    with refused(ModelError, str(folder), "1 of"):
        open_bundle(folder, template="extra_id")
    tried("number", "weight of a source")


def test_predictions(tmp_path, tried):
    """Weights that are finite, and an output that is not."""
    folder = reward_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"][2] = np.sign(tensors["score.weight"][2]) * 3e38
    save_file(tensors, folder / "model.safetensors")
    scorer = Scorer(open_bundle(folder, template="extra_id"))
    conversation = Conversation((Turn("user", "u"), Turn("assistant", "a")))
    chunk = scorer.prepare([conversation], [[1]])
    with refused(ModelError, str(folder), HELPSTEER.names[2], cure="--dtype"):
        scorer.score(chunk)
    tried("number", "prediction")


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "[NaN]", "true", '"4"']
)
def test_ratings(tried, text):
    with refused(DataError, "helpfulness"):
        check_rating(json.loads(text), dataclasses.replace(HELPSTEER["helpfulness"]))
    tried("number", "rating")
