"""Trackers: what they are told, what they refuse at the start, and that none costs a run."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError, SteerjaxError
from steerjax.report.records import read_metrics
from steerjax.training import trackers
from steerjax.training.train import train
from tests.refusals import refused

PICTURES = {"report/correlations", "report/loss", "report/predictions"}


def experiment(*names: str, steps: int = 3, plots: bool = False):
    config = default_config()
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=2304)
    config.optimizer.update(schedule="constant")
    config.train.update(steps=steps, evaluate_every=2, plots=plots, trackers=names)
    return resolve(config.to_dict())


def figures(workdir) -> list[dict]:
    """The records of metrics.jsonl as a tracker is told them."""
    found = read_metrics(workdir / "metrics.jsonl")
    return [
        {"step": r["step"]}
        | {f"{r['split']}/{k}": v for k, v in r.items() if k not in ("step", "split") and v is not None}
        for r in found
    ]


@pytest.fixture
def wandb_environment(monkeypatch, tmp_path):
    """Nobody's key and settings; what a process keeps between runs is forgotten."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    wandb.teardown()
    yield monkeypatch.setenv
    wandb.teardown()


def inspected(folder) -> list[dict]:
    """The records of a run's log, as W&B's own reader shows them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_an_unknown_name_is_refused_with_those_there_are():
    with refused(ConfigError, "config.train.trackers", "mlflow", cure="tensorboard"):
        experiment("tensorboard", "mlflow")
    with refused(ConfigError, "config.train.trackers", "mlflow", cure="tensorboard"):
        experiment("tensorboard, mlflow")


def test_names_with_commas():
    """As a flag on the command line gives them."""
    assert experiment("tensorboard,wandb").train.trackers == ("tensorboard", "wandb")
    assert experiment("").train.trackers == experiment().train.trackers == ()


@pytest.mark.slow
def test_wandb_offline_has_the_metrics_and_a_resume_goes_on_with_the_same_run(wandb_environment, tmp_path):
    wandb_environment("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    train(experiment("wandb", steps=2), workdir)
    train(experiment("wandb", steps=3, plots=True), workdir)
    first, second = [inspected(f) for f in sorted((workdir / "wandb").glob("offline-run-*"))]
    runs = [next(r["run"] for r in records if r["type"] == "run") for records in (first, second)]
    assert runs[0]["run_id"] == runs[1]["run_id"]
    assert {(r["project"], r["display_name"]) for r in runs} == {("steerjax", "run")}
    told = [r["history"]["item"] for r in first + second if r["type"] == "history"]
    *logged, pictures = [{k: v for k, v in item.items() if not k.startswith("_")} for item in told]
    assert logged == figures(workdir)
    assert {name.rsplit(".", 1)[0] for name in pictures if name != "step"} == PICTURES
    saved = [path for r in second if r["type"] == "files" for path in (f["path"] for f in r["files"]["files"])]
    assert sum(path.endswith(".png") for path in saved) == 3
    config = next(r["config"]["update"] for r in second if r["type"] == "config")
    assert config == json.loads((workdir / "config.json").read_text())
    assert [r["exit"]["exit_code"] for r in first + second if r["type"] == "exit"] == [0, 0]


def test_wandb_without_a_key_is_refused_at_the_start(wandb_environment, tmp_path):
    with refused(SteerjaxError, "wandb", cure="WANDB_MODE=offline"):
        train(experiment("wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_the_run_offline(wandb_environment, tmp_path, capsys):
    wandb_environment("WANDB_API_KEY", "a" * 40)
    wandb_environment("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb_environment("WANDB_INIT_TIMEOUT", "2")
    trackers.WandB.check()
    found = trackers.Trackers(("wandb",), tmp_path, 0, {})
    found.log(1, "train", {"loss": 1.0})
    found.close(failed=True)
    assert "wandb sync" in capsys.readouterr().out
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    records = inspected(folder)
    assert [r["history"]["item"]["train/loss"] for r in records if r["type"] == "history"] == [1.0]
    assert [r["exit"]["exit_code"] for r in records if r["type"] == "exit"] == [1]


def test_a_missing_wandb_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with refused(SteerjaxError, "wandb", cure="steerjax[wandb]"):
        train(experiment("wandb"), tmp_path)


@pytest.mark.parametrize("broken", ["__init__", "log", "show", "close"])
def test_a_tracker_that_fails_costs_no_run(broken, monkeypatch, tmp_path, capsys):
    calls = []

    class Broken:
        check = staticmethod(lambda: None)

        def __init__(self, *_):
            self.call("__init__")

        def call(self, name):
            calls.append(name)
            if name == broken:
                raise OSError("out of order")

        def log(self, *_):
            self.call("log")

        def show(self, *_):
            self.call("show")

        def close(self, **_):
            self.call("close")

    monkeypatch.setitem(trackers.TRACKERS, "broken", Broken)
    found = trackers.Trackers(("broken", "tensorboard"), tmp_path, 0, {})
    found.log(1, "train", {"loss": 1.0})
    found.log(2, "train", {"loss": 1.0})
    found.show(2, {})
    found.close(failed=False)
    assert calls[-1] == broken  # and it is left alone from there on
    assert capsys.readouterr().out.count("out of order") == 1
    assert len(list(events(tmp_path / "tensorboard"))) > 2


def events(folder):
    """The events of TensorBoard's files: (length, checksum, record, checksum) one after the other."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


@pytest.mark.slow
def test_tensorboard_has_the_metrics_the_config_and_the_pictures(tmp_path):
    train(experiment("tensorboard", plots=True), tmp_path)
    values = [(e.step, v) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    scalars = {(step, v.tag): v.simple_value for step, v in values if v.HasField("simple_value")}
    expected = {(f["step"], name): value for f in figures(tmp_path) for name, value in f.items() if name != "step"}
    assert scalars.keys() == expected.keys()
    np.testing.assert_allclose([scalars[key] for key in expected], list(expected.values()), rtol=1e-6)
    assert {v.tag for _, v in values if v.HasField("image")} == PICTURES
    assert any("row_length" in str(v.tensor) for _, v in values if v.tag.startswith("config"))


@pytest.mark.slow
def test_no_tracker_leaves_metrics_alone(tmp_path):
    train(experiment(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"metrics.jsonl", "checkpoints"}
    assert not (tmp_path / "tensorboard").exists()
