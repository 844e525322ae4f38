"""A new objective is one file and a line in the registry; it trains with the command's own function."""

import numpy as np
import pytest

from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError
from steerjax.objectives import OBJECTIVES
from steerjax.report.records import read_metrics
from steerjax.training.train import train
from tests.refusals import refused


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "length", "tests.objectives.own_objective:Length")


def experiment(objectives, **changes):
    config = default_config()
    config.objectives = objectives
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=2560)
    config.optimizer.update(learning_rate=3e-2, schedule="constant", warmup_steps=0, epsilon=1e-6)
    config.train.update(steps=3, plots=False)
    for key, value in changes.items():
        group, name = key.split("__")
        config[group][name] = value
    return resolve(config.to_dict())


def losses(workdir, split="train", key="loss"):
    return np.array([r[key] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == split])


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_an_own_objective_trains_alone_and_beside_another(tmp_path, capsys):
    changes = {"length__scale": 0.005, "train__steps": 8, "train__evaluate_every": 1}
    found = train(experiment(("length",), **changes), tmp_path / "alone")
    errors = losses(tmp_path / "alone", "validation", "length_error")
    assert errors[-1] < 0.9 * errors[0]
    assert errors[-1] == pytest.approx(found["length"].loss)
    both = {}
    for micro_batches in (1, 4):
        workdir = tmp_path / str(micro_batches)
        # At the rate above the loss triples at once, and what two programs round differently grows with it.
        changes = {"length__weight": 0.5, "optimizer__learning_rate": 1e-3, "batch__micro_batches": micro_batches}
        changes |= {"mesh__data": 2, "mesh__context": 4}
        train(experiment(("regression", "length"), **changes), workdir)
        both[micro_batches] = losses(workdir)
        parts = losses(workdir, key="regression/loss") + 0.5 * losses(workdir, key="length/loss")
        np.testing.assert_allclose(both[micro_batches], parts, rtol=1e-5)
    np.testing.assert_allclose(both[4], both[1], rtol=1e-5)
    printed = capsys.readouterr().out
    assert "length: " in printed
    assert "mean rating" in printed


@pytest.mark.usefixtures("registered")
def test_a_mix_of_reward_and_chat_objectives_is_refused():
    for objectives in (("regression", "sft"), ("regression", "regression"), ()):
        with refused(ConfigError, "config.objectives", str(objectives)):
            experiment(objectives)
    with refused(ConfigError, "config.objectives", "lenght", cure="length"):
        experiment(("lenght",))
