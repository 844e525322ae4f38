"""The command as a user runs it: resume after SIGKILL, compile once, reports, refusals."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from steerjax import checksums
from steerjax.bundle import open_bundle
from steerjax.bundle.describe import read_provenance
from steerjax.bundle.store import CheckpointStore
from steerjax.config import default_config, resolve
from steerjax.errors import CheckpointError, ConfigError, LockedError, TrainingError
from steerjax.models.config import ModelConfig
from steerjax.parallel.mesh import MeshConfig
from steerjax.report.records import read_metrics
from steerjax.training import train as training
from steerjax.training.workdir import claim_workdir, only_run
from tests.faults.damage import damage
from tests.helpers import slow_but
from tests.refusals import refused, says
from tests.reward_models import reward_folder

TIMES = (
    "examples_per_second", "tokens_per_second", "unshared_tokens_per_second", "model_tflops_per_second_per_device",
)  # fmt: skip
RECIPE = """
from steerjax.config import default_config

def get_config():
    config = default_config()
    config.data.train = ({data!r},)
    config.data.validation_fraction = 0.25
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=128)
    config.compute.attention_chunk = 32
    config.train.update(steps=12, evaluate_every=5, checkpoint_every=4, plots=False)
    # AdamW makes a whole step of a gradient that is only rounding, unless epsilon is above it.
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2, epsilon=1e-6)
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A tiny recipe over 60 made-up rows of 20 prompts."""
    folder = tmp_path_factory.mktemp("recipe")
    random = np.random.default_rng(0)
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    words = [
        "the",
        "model",
        "answers",
        "with",
        "care",
        "and",
        "says",
        "what",
        "it",
        "knows",
        "about",
        "rivers",
        "trees",
        "and",
        "stones",
    ]
    with (folder / "rows.jsonl").open("w") as file:
        for prompt in range(20):
            for _ in range(3):
                response = " ".join(random.choice(words, random.integers(2, 12)))
                ratings = dict(zip(names, random.integers(0, 5, 5).tolist(), strict=True))
                file.write(json.dumps({"prompt": f"Question {prompt}?", "response": response, **ratings}) + "\n")
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(data=str(folder / "rows.jsonl")))
    return path


def experiment(recipe: Path, **train):
    namespace: dict = {}
    exec(recipe.read_text(), namespace)
    config = namespace["get_config"]()
    config.train.update(train)
    return resolve(config.to_dict())


def command(recipe: Path, workdir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "steerjax.train", f"--config={recipe}", f"--workdir={workdir}", *flags]


def environment(repository: Path) -> dict[str, str]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "/tmp/steerjax-test-cache")
    python_path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": python_path, "JAX_COMPILATION_CACHE_DIR": cache}


def records(workdir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir / "metrics.jsonl")]


def parameters(workdir: Path) -> dict:
    """The last checkpoint's parameters."""
    return open_bundle(workdir, MeshConfig(data=8)).params


def kill_after_step(arguments: list[str], workdir: Path, step: int, env: dict, sent: signal.Signals) -> int:
    """Starts the command and sends a signal once metrics.jsonl has that step."""
    process = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 240
    try:
        while not any(r["step"] >= step for r in read_metrics(workdir / "metrics.jsonl")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        return process.wait(timeout=120)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(recipe, repository, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(recipe, workdir), env=environment(repository), check=True, stdout=subprocess.DEVNULL)
    return workdir


def assert_same_parameters(a, b, atol: float = 0.0) -> None:
    import jax

    from tests.helpers import assert_trees_close

    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert_trees_close(a, b, rtol=0.0, atol=atol)


@pytest.mark.short
@pytest.mark.parametrize("step", slow_but(11, [6, 11]))
def test_killed_and_started_again_equals_uninterrupted(recipe, repository, uninterrupted, tmp_path, step):
    """SIGKILL in mid-run; the later metrics and the parameters are the same to the bit."""
    env = environment(repository)
    assert kill_after_step(command(recipe, tmp_path), tmp_path, step, env, signal.SIGKILL) == -signal.SIGKILL
    subprocess.run(command(recipe, tmp_path), env=env, check=True, stdout=subprocess.DEVNULL)
    assert records(tmp_path) == records(uninterrupted)
    assert_same_parameters(parameters(tmp_path), parameters(uninterrupted))


@pytest.mark.slow
def test_resumed_on_another_mesh(recipe, repository, uninterrupted, tmp_path):
    """From one device to data 2 and fsdp 4 on eight virtual devices: within 1e-5."""
    env = environment(repository)
    kill_after_step(command(recipe, tmp_path), tmp_path, 6, env, signal.SIGKILL)
    env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    flags = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    subprocess.run(command(recipe, tmp_path, *flags), env=env, check=True, stdout=subprocess.DEVNULL)
    for ours, expected in zip(records(tmp_path), records(uninterrupted), strict=True):
        assert ours["step"] == expected["step"]
        np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-5)
    assert_same_parameters(parameters(tmp_path), parameters(uninterrupted), atol=1e-5)


def test_sigterm_saves_and_says_so(recipe, repository, uninterrupted, tmp_path):
    env = environment(repository)
    assert kill_after_step(command(recipe, tmp_path), tmp_path, 2, env, signal.SIGTERM) == 2
    subprocess.run(command(recipe, tmp_path), env=env, check=True, stdout=subprocess.DEVNULL)
    assert records(tmp_path) == records(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "last"), [(signal.SIGTERM, 3), (signal.SIGINT, 6)])
def test_a_signal_at_an_evaluation_saves_first(recipe, tmp_path, monkeypatch, sent, last):
    """An evaluation can take longer than a preempted machine has left; what was owed is done when the run goes on."""
    write = training.step_record

    def record(run, rows, metrics, seconds):
        if len(read_metrics(tmp_path / "metrics.jsonl")) == 4:  # two steps, each with its evaluation
            os.kill(os.getpid(), sent)
        return write(run, rows, metrics, seconds)

    monkeypatch.setattr(training, "step_record", record)
    options = {"steps": last, "evaluate_every": 1, "checkpoint_every": 0}
    with refused(TrainingError, "step 3", cure="the same command"):
        training.train(experiment(recipe, **options), tmp_path)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] != "train"] == [1, 2]
    monkeypatch.undo()
    evaluate, late = training.Run.evaluate, [0.0]

    def slow(*arguments, **named):
        late[0] += 1e6
        return evaluate(*arguments, **named)

    monkeypatch.setattr(training.Run, "evaluate", slow)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    training.train(experiment(recipe, **options), tmp_path)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in found if r["split"] != "train"] == list(range(1, last + 1))
    assert all(r["examples_per_second"] > 1e-3 for r in found if r["split"] == "train"), "an evaluation is no step"


def test_metrics_have_what_the_interface_promises(uninterrupted):
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    training = [r for r in lines if r["split"] == "train"]
    assert [r["step"] for r in training] == list(range(1, 13))
    keys = {"loss", "learning_rate", "grad_norm", *TIMES}
    assert all(keys <= r.keys() for r in training)
    assert [r["step"] for r in lines if r["split"] == "validation"] == [4, 5, 8, 10, 12]
    for name in ("helpfulness", "verbosity"):
        for metric in ("mse", "mae", "pearson", "spearman"):
            assert f"attributes/{name}/{metric}" in lines[-1]
    losses = [r["loss"] for r in training]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["steps"] == 12
    assert list((uninterrupted / "tensorboard").glob("events*"))


@pytest.mark.short
def test_checkpoints_keep_the_last_and_the_best(uninterrupted):
    with CheckpointStore(uninterrupted / "checkpoints", 2) as store:
        losses = {r["step"]: r["loss"] for r in read_metrics(uninterrupted / "metrics.jsonl") if r["split"] != "train"}
        best = min((4, 8, 12), key=losses.get)
        assert store.best_step() == best
        kept = {int(p.name) for p in (uninterrupted / "checkpoints").iterdir() if p.name.isdigit()}
        assert kept == {8, 12, best}
    provenance = read_provenance(uninterrupted / "checkpoints" / "12")
    assert provenance.attributes[0].name == "helpfulness"
    assert provenance.template == "extra_id"
    assert all(len(digest) == 64 for digest in provenance.data.values())
    assert provenance.config["train"]["steps"] == 12


def test_train_step_compiles_once(recipe, tmp_path, monkeypatch):
    """Over a whole run with evaluation, a last partial batch and checkpoints; the evaluation step too."""
    programs = []
    original = training.Program.__init__
    monkeypatch.setattr(training.Program, "__init__", lambda self, *a: (original(self, *a), programs.append(self))[0])
    training.train(experiment(recipe, steps=7), tmp_path)
    (program,) = programs
    assert program.train_step._cache_size() == 1
    assert program.evaluation_step._cache_size() == 1


def test_report_and_plots(recipe, tmp_path, capsys):
    result = training.train(experiment(recipe, steps=3, plots=True), tmp_path)["regression"].detail
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*result.schema.names, "mean rating", "log length", "parameters", "filled"))
    for name in ("loss.png", "predictions.png", "correlations.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "helpfulness" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.short
def test_the_first_loss_does_not_depend_on_micro_batches(recipe, tmp_path):
    """The head is made from all rows of the first step, not from those of the first micro-batch."""
    found = []
    for micro_batches in (1, 2, 4):
        e = experiment(recipe, steps=3)
        e = dataclasses.replace(e, batch=dataclasses.replace(e.batch, micro_batches=micro_batches, evaluation_rows=8),
                                mesh=MeshConfig(data=2, fsdp=1, tensor=1, context=4))  # fmt: skip
        workdir = tmp_path / str(micro_batches)
        training.train(e, workdir)
        found.append([r["loss"] for r in read_metrics(workdir / "metrics.jsonl")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


def test_first_predictions_lie_near_the_mean(recipe, tmp_path):
    training.train(experiment(recipe, steps=4), tmp_path)
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first["loss"] < 3  # the variance of ratings uniform over 0..4 is 2; predictions of 0 would cost 6


def test_gradients_that_stay_infinite_stop_the_run(recipe, tmp_path):
    e = experiment(recipe)
    heavy = {"regression": dataclasses.replace(e.objective["regression"], weight=1e30)}
    bad = dataclasses.replace(e, objective=heavy, optimizer=dataclasses.replace(e.optimizer, max_bad_steps=3))
    with refused(TrainingError, "3 steps", cure="config.optimizer.learning_rate"):
        training.train(bad, tmp_path)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda c: c.optimizer.update(learning_rate=1e-3), ("config.optimizer.learning_rate", "0.003", "0.001")),
        (lambda c: c.train.update(seed=3), ("config.train.seed", "0", "3")),
        (lambda c: c.model.update(num_layers=1), ("config.model.num_layers", "2", "1")),
    ],
)
def test_a_workdir_of_another_run_is_refused(recipe, uninterrupted, change, facts):
    namespace: dict = {}
    exec(recipe.read_text(), namespace)
    config = namespace["get_config"]()
    change(config)
    with refused(CheckpointError, *facts):
        training.train(resolve(config.to_dict()), uninterrupted)


def test_a_run_out_of_memory_may_go_on_in_more_micro_batches(tmp_path):
    """config.json is there before the first step is compiled."""
    config = default_config()
    claim_workdir(tmp_path, resolve(config.to_dict()))
    config.batch.update(micro_batches=2, evaluation_rows=4)
    claim_workdir(tmp_path, resolve(config.to_dict()))
    config.batch.row_length //= 2
    with refused(CheckpointError, "config.batch.row_length"):
        claim_workdir(tmp_path, resolve(config.to_dict()))


def test_errors_are_messages_and_not_tracebacks(recipe, repository, tmp_path):
    run = subprocess.run(
        command(recipe, tmp_path, "--config.batch.row_length=16"), env=environment(repository), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    says(run.stderr, "rows.jsonl", "16", cure="config.batch.row_length")
    assert "Traceback" not in run.stderr


def test_unknown_flag_of_the_config(recipe, repository, tmp_path):
    run = subprocess.run(
        command(recipe, tmp_path, "--config.batch.row_lenght=16"), env=environment(repository), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    says(run.stderr, "row_lenght", "row_length", cure="train --help")
    assert "Traceback" not in run.stderr


def test_help_is_quick(repository):
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "steerjax.train", "--help"], env=environment(repository), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "--config" in run.stdout
    assert "--workdir" in run.stdout
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 1  # seconds of a processor; about 0.1


def test_mesh_errors_name_the_cure(recipe, tmp_path):
    e = experiment(recipe)
    for mesh, facts in (
        (MeshConfig(data=3), ("data 3", "8 devices")),
        (MeshConfig(data=-1, fsdp=3), ("data -1", "fsdp 3", "8 devices")),
        (MeshConfig(data=2, tensor=4), ("kv_heads 1", "4")),
    ):
        with refused(ConfigError, *facts):
            training.train(dataclasses.replace(e, mesh=mesh), tmp_path / "mesh")
    assert default_config().mesh.data == -1


def edited(recipe: Path, folder: Path, edit) -> Path:
    """A copy of the recipe and its rows, the rows edited."""
    rows = (recipe.parent / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(edit(rows)) + "\n")
    path = folder / "recipe.py"
    path.write_text(recipe.read_text().replace(str(recipe.parent / "rows.jsonl"), str(folder / "rows.jsonl")))
    return path


@pytest.mark.slow
def test_a_resume_on_other_data_is_refused_or_recorded(recipe, tmp_path):
    path = edited(recipe, tmp_path, lambda rows: rows)
    training.train(experiment(path, steps=4), tmp_path / "run")
    edited(recipe, tmp_path, lambda rows: rows[:-3])
    with refused(CheckpointError, "rows.jsonl", cure="config.train.accept_changes"):
        training.train(experiment(path, steps=6), tmp_path / "run")
    training.train(experiment(path, steps=6, accept_changes=True), tmp_path / "run")
    (accepted,) = read_provenance(tmp_path / "run" / "checkpoints" / "6").accepted
    assert "rows.jsonl" in accepted


def inverted(rows):
    """The same rows with the ratings turned around."""
    return [{k: 4 - v if isinstance(v, int) else v for k, v in row.items()} for row in rows]


def test_a_resume_on_other_inputs_is_refused(recipe, tmp_path):
    """Inverted ratings; a recipe, or a config.json of the workdir, with another key; a validation file; all refused."""
    path, run = edited(recipe, tmp_path, lambda rows: rows), tmp_path / "run"
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "held_out.jsonl").write_text(rows)

    def go(steps, **changes):
        e = experiment(path, steps=steps)
        data = dataclasses.replace(e.data, validation=(str(tmp_path / "held_out.jsonl"),))
        training.train(dataclasses.replace(e, data=data, **changes), run)

    go(4)
    for name in ("rows.jsonl", "held_out.jsonl"):
        changed = inverted(map(json.loads, rows.splitlines()))
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in changed))
        with refused(CheckpointError, name, cure="--config.train.accept_changes=True"):
            go(6)
        (tmp_path / name).write_text(rows)
    e = experiment(path, steps=6)
    faster = dataclasses.replace(e.optimizer, learning_rate=1.0)
    with refused(CheckpointError, "config.optimizer.learning_rate", cure="--workdir"):
        go(6, optimizer=faster)
    said = json.loads((run / "config.json").read_text())
    said["optimizer"]["learning_rate"] = 1.0
    (run / "config.json").write_text(json.dumps(said))  # as the other recipe would have it
    with refused(CheckpointError, "config.optimizer.learning_rate", cure="--workdir"):
        go(6, optimizer=faster)
    (run / "config.json").unlink()
    with refused(CheckpointError, "config.optimizer.learning_rate", cure="--workdir"):
        go(6, optimizer=faster)
    go(6)


@pytest.mark.slow
def test_a_resume_on_another_source_model_is_refused_or_recorded(recipe, tmp_path):
    model, run = reward_folder(tmp_path / "model"), tmp_path / "run"
    (model / "steerjax.json").write_text('{"kind": "reward", "template": "extra_id"}')

    def go(steps, **train):
        e = experiment(recipe, steps=steps, **train)
        training.train(dataclasses.replace(e, model=ModelConfig(source=str(model))), run)

    go(4)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the last tensor, far from the blocks that were sampled
    file.write_bytes(content)
    with refused(CheckpointError, "source model", str(model), cure="--config.train.accept_changes=True"):
        go(5)
    go(5, accept_changes=True)
    (accepted,) = read_provenance(run / "checkpoints" / "5").accepted
    assert "source model" in accepted


@pytest.mark.parametrize(
    "small", [pytest.param(checksums.SMALL, id="before", marks=pytest.mark.slow), pytest.param(0, id="after")]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_as_one_without_damage(
    recipe, tmp_path, capfd, monkeypatch, small
):
    """Bit for bit, from the checkpoint before; seen before it is restored, or after, as in large files."""
    monkeypatch.setattr(checksums, "SMALL", small)
    whole, run = tmp_path / "whole", tmp_path / "run"
    training.train(experiment(recipe, steps=12), whole)
    shutil.copytree(whole, run)
    damage(max((run / "checkpoints" / "12" / "training").rglob("d/*"), key=lambda p: p.stat().st_size), "flip", 0)
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b"garbage\n[]\n\0\0{}\n\xff\n{}\n")
    training.train(experiment(recipe, steps=12), run)
    said = capfd.readouterr()
    assert "12' is damaged: training/" in said.err
    assert "resumed at step 8" in said.out
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir()) == ["12", "12.damaged", "8"]
    mine, theirs = (flat(parameters(each)) for each in (run, whole))
    for name in mine.keys() | theirs.keys():
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert len(list(run.glob("metrics.*.jsonl"))) == 1  # with the lines that are no records
    assert records(run) == records(whole)


def flat(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_records_of_a_run_without_a_checkpoint_are_kept_aside(recipe, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 7.0}\n')
    training.train(experiment(recipe, steps=3, checkpoint_every=0), tmp_path)
    aside = list(tmp_path.glob("metrics.*.jsonl"))
    assert len(aside) == 1
    assert read_metrics(aside[0])[0]["loss"] == 7.0


def test_a_validation_file_that_shares_prompts_is_used_and_said(recipe, tmp_path, capsys):
    e = experiment(recipe, steps=3)
    e = dataclasses.replace(e, data=dataclasses.replace(e.data, validation=e.data.train))
    training.train(e, tmp_path)
    assert "20 prompts" in capsys.readouterr().out


def test_two_runs_in_one_folder_are_refused(recipe, tmp_path):
    """The second would find no checkpoint yet and begin anew."""
    with only_run(tmp_path, active=True), refused(LockedError, str(tmp_path), f"process {os.getpid()}", cure="wait"):
        training.train(experiment(recipe, steps=3), tmp_path)
    training.train(experiment(recipe, steps=3), tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "report", "tensorboard", "compile_cache", "metrics.jsonl"])
def test_a_file_where_the_run_has_a_folder_is_refused_at_the_start(name, tmp_path):
    path = tmp_path / name
    path.touch() if not path.suffix else path.mkdir()
    with refused(CheckpointError, str(path), cure="--workdir"):
        claim_workdir(tmp_path, resolve(default_config().to_dict()))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_remote_workdir_is_refused(recipe, repository):
    run = subprocess.run(
        [*command(recipe, Path("x"))[:-1], "--workdir=gs://bucket/run"], env=environment(repository),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    says(run.stderr, "gs://bucket/run")


def test_texts_longer_than_the_models_positions_are_bad_rows(recipe, tmp_path):
    e = experiment(recipe, steps=2)
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, max_position_embeddings=40))
    from steerjax.errors import DataError

    with refused(DataError, "rows.jsonl:1", "model.max_position_embeddings", "40"):
        training.train(e, tmp_path)
