"""Several processes on loopback: equal to one, and one that fails ends all with its name. Tiny models, real runs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.distributed import State

from steerjax.bundle.reader import CheckpointReader
from steerjax.checksums import write_list
from steerjax.config import resolve
from steerjax.errors import TrainingError
from steerjax.parallel import processes
from steerjax.parallel.processes import ALONE, Processes, connect
from steerjax.report.records import read_metrics
from steerjax.training import train as training
from tests.faults.damage import damage

slow = pytest.mark.slow
STEPS = 8
RECIPE = """
from steerjax.config import default_config

def get_config():
    config = default_config()
    config.data.train = ({data!r},)
    config.data.validation_fraction = 0.25
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=4)
    config.batch.update(rows=8, row_length=128)
    config.compute.attention_chunk = 64
    config.train.update(steps={steps}, checkpoint_every=4, plots=False)
    # Adam would make whole steps of the rounding of gradients that lie near the usual epsilon.
    config.optimizer.update(learning_rate=1e-3, warmup_steps=2, epsilon=1e-6)
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    random = np.random.default_rng(0)
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    with (folder / "rows.jsonl").open("w") as file:
        for row in range(40):
            ratings = dict(zip(names, random.integers(0, 5, 5).tolist(), strict=True))
            text = " ".join(random.choice(["rivers", "trees", "stones"], random.integers(2, 12)))
            file.write(json.dumps({"prompt": f"Question {row // 2}?", "response": text, **ratings}) + "\n")
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(data=str(folder / "rows.jsonl"), steps=STEPS))
    return path


def train_alone(recipe: Path, workdir: Path, **train) -> None:
    """One process on one device: this one."""
    namespace: dict = {}
    exec(recipe.read_text(), namespace)
    config = namespace["get_config"]()
    config.train.update(train)
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = training.make_mesh
        patch.setattr(training, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        training.train(resolve(config.to_dict()), workdir)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    train_alone(recipe, workdir)
    return workdir


def surroundings(root: Path) -> dict[str, str]:
    """The environment of a process; it compiles in half the time, to slower code."""
    return os.environ | {
        "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "STEERJAX_CPU_DEVICES": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", "/tmp/steerjax-test-cache"),
    }  # fmt: skip


class Group:
    """Processes of one run, each with an output of its own; killed when the test is over."""

    def __init__(self, commands: list[list[str]], folder: Path, **environment: str):
        root = Path(__file__).resolve().parents[2]
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        base = surroundings(root) | {"STEERJAX_COORDINATOR": address, "STEERJAX_PROCESSES": str(len(commands))}
        self.files = [folder / f"output.{i}" for i in range(len(commands))]
        self.processes = []
        for i, (command, path) in enumerate(zip(commands, self.files, strict=True)):
            with path.open("w") as file:
                one = base | {"STEERJAX_PROCESS": str(i)} | environment
                self.processes.append(subprocess.Popen(command, env=one, stdout=file, stderr=file, cwd=root))

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit statuses."""
        end = time.time() + seconds
        return [p.wait(max(0.1, end - time.time())) for p in self.processes]

    def output(self, i: int) -> str:
        return self.files[i].read_text()

    def wait_for(self, i: int, words: str) -> None:
        end = time.time() + 240
        while words not in self.output(i):
            assert self.processes[i].poll() is None, self.output(i)
            assert time.time() < end, self.output(i)
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def worker(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.parallel.worker", *map(str, arguments)]


def command(recipe: Path, workdir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "steerjax.train", f"--config={recipe}", f"--workdir={workdir}", *flags]


def parameters(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    reader = CheckpointReader(workdir / "checkpoints" / str(step))
    return {name: reader.read(name, tuple(slice(n) for n in shape)) for name, shape in reader.shapes.items()}


def assert_same_run(workdir: Path, alone: Path) -> None:
    """Losses of all steps and the last parameters, within 1e-5."""
    ours, expected = (read_metrics(path / "metrics.jsonl") for path in (workdir, alone))
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in expected]
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in expected], rtol=1e-5)
    ours, expected = parameters(workdir), parameters(alone)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


@slow
@pytest.mark.parametrize(
    ("count", "devices", "meshes"),
    [
        (2, 1, ("data=2", "fsdp=2", "tensor=2")),
        (4, 1, ("data=4", "fsdp=4", "tensor=4", "data=2,fsdp=2")),
        (2, 2, ("data=2,tensor=2", "fsdp=2,tensor=2", "fsdp=4")),
    ],
)
def test_several_train_as_one(recipe, alone, repository, tmp_path, count, devices, meshes):
    """Started by launch/local.sh; only process 0 writes files of its own."""
    launch = [repository / "launch" / "local.sh", str(count), str(devices), "--"]
    run = subprocess.run(
        [*launch, *worker("train", recipe, tmp_path, *meshes)],
        env=surroundings(repository), cwd=repository, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    for mesh in meshes:
        assert_same_run(tmp_path / mesh, alone)
    wrote = {i: eval(files) for i, files in re.findall(r"^\[(\d)\] wrote (.*)$", run.stdout, re.MULTILINE)}
    assert any(path.endswith("metrics.jsonl") for path in wrote["0"])
    assert [wrote[str(i)] for i in range(1, count)] == [[]] * (count - 1)


@slow
def test_sigterm_to_one_stops_all_at_one_step_and_another_number_goes_on(recipe, alone, tmp_path, capsys):
    """Two processes are stopped through one of them; one process finishes the run, equal to an uninterrupted one."""
    workdir = tmp_path / "run"
    with Group([command(recipe, workdir)] * 2, tmp_path) as group:
        group.wait_for(0, "step 1/")
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.wait() == [2, 2]
        said = [re.search(r"signal.* step (\d+)", group.output(i)) for i in range(2)]
    assert said[0], group.output(0)
    assert said[0][1] == said[1][1]
    assert (workdir / "checkpoints" / said[0][1]).is_dir()
    train_alone(recipe, workdir)
    assert f"resumed at step {said[0][1]} of {STEPS}" in capsys.readouterr().out
    assert_same_run(workdir, alone)


@slow
def test_from_four_to_one_and_back(recipe, alone, tmp_path):
    """Each start goes on from the last checkpoint; the end equals that of one process with the same starts."""
    workdir = tmp_path / "run"

    def four(mesh: str, steps: int) -> None:
        flags = ("--config.mesh.data=1", f"--config.mesh.{mesh}=4", f"--config.train.steps={steps}")
        with Group([command(recipe, workdir, *flags)] * 4, tmp_path) as group:
            assert group.wait() == [0] * 4, group.output(0)

    four("fsdp", STEPS)
    assert_same_run(workdir, alone)
    train_alone(recipe, workdir, steps=12)
    four("tensor", 16)
    expected = tmp_path / "expected"
    for steps in (STEPS, 12, 16):
        train_alone(recipe, expected, steps=steps)
    ours, theirs = parameters(workdir, 16), parameters(expected, 16)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


@slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_its_name(recipe, tmp_path, victim):
    """Within 60 seconds, in the middle of training."""
    flags = ("--config.train.steps=100000", "--config.train.checkpoint_every=0")
    with Group([command(recipe, tmp_path / "run", *flags)] * 2, tmp_path) as group:
        group.wait_for(0, "packed rows")
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3:
            assert group.processes[0].poll() is None, group.output(0)
            time.sleep(0.05)
        group.processes[victim].kill()
        killed = time.time()
        other = 1 - victim
        assert group.processes[other].wait(60) != 0
        print(f"ended {time.time() - killed:.1f} s after the kill")
        assert re.search(rf"process {other} of 2 .*process {victim}\b.*killed", group.output(other))


def test_process_0_killed_is_named(tmp_path):
    """jax aborts the others at once, without a name; ours speaks too."""
    with Group([worker("stuck")] * 3, tmp_path) as group:
        for i in range(3):
            group.wait_for(i, "stuck")
        group.processes[0].kill()
        assert all(group.wait(60))
        for i in (1, 2):
            assert re.search(rf"process {i} of 3 .*process 0\b", group.output(i))


@slow
def test_an_exception_in_one_ends_all_with_its_error(recipe, tmp_path):
    with Group([worker("train", recipe, tmp_path / "run", "data=2")] * 2, tmp_path, FAIL_AT="1:5") as group:
        assert group.wait() == [1, 1]
        assert re.search("process 0 of 2 .*process 1 of 2 .*ZeroDivisionError: made to fail", group.output(0))
        assert 'raise ZeroDivisionError("made to fail")' in group.output(1)


def test_processes_that_differ_are_named(recipe, tmp_path):
    """One has another learning rate; nothing is compiled and no workdir is claimed."""
    workdir = tmp_path / "run"
    other = command(recipe, workdir, "--config.optimizer.learning_rate=0.002")
    with Group([command(recipe, workdir), other], tmp_path) as group:
        assert group.wait() == [1, 1]
        said = r"process 1 .*config\.optimizer\.learning_rate.* 0\.002.* 0\.001"
        assert any(re.search(said, group.output(i)) for i in range(2)), group.output(0)
    assert not (workdir / "config.json").exists()


def test_each_builds_only_its_rows(tmp_path):
    with Group([worker("feed")] * 2, tmp_path) as group:
        assert group.wait() == [0, 0], group.output(0)
        assert "built [0, 1, 2, 3] 112" in group.output(0)
        assert "built [4, 5, 6, 7] 112" in group.output(1)


def test_each_reads_its_share_of_a_checkpoint_and_all_agree(tmp_path):
    """The flip lies in the share of one process; both go on from the older checkpoint, of which each reads a half."""
    checkpoints, names = tmp_path / "checkpoints", {"a", "b", "c", "d"}
    for step in ("3", "5"):
        (checkpoints / step).mkdir(parents=True)
        for name in names:
            (checkpoints / step / name).write_bytes(name.encode() * 1000)
        write_list(checkpoints / step)
    damage(checkpoints / "5" / "c", "flip", 0)
    with Group([worker("aside", checkpoints)] * 2, tmp_path) as group:
        assert group.wait() == [0, 0], group.output(0) + group.output(1)
        said = [group.output(i) for i in range(2)]
    found = [re.search(r"^read (\[.*\]) left (\[.*\])$", text, re.MULTILINE) for text in said]
    read, left = zip(*((eval(match[1]), eval(match[2])) for match in found), strict=True)
    assert left == (["3", "5.damaged"],) * 2
    for step in ("3", "5"):
        shares = [{Path(name).name for name in one if name.startswith(step)} for one in read]
        assert sorted(map(len, shares)) == [2, 2]
        assert set.union(*shares) == names
    assert ["c does not have its checksum" in text for text in said].count(True) == 1


def test_a_barrier_names_who_is_late(tmp_path):
    with Group([worker("late")] * 2, tmp_path) as group:
        assert group.wait(60) == [1, 1]
        for i in range(2):
            assert re.search("'save step 8'.*process 1 of 2 .*'reading the rows'", group.output(i))


def test_a_start_that_is_not_answered_says_so(tmp_path):
    settings = {"STEERJAX_START_SECONDS": "2", "STEERJAX_PROCESSES": "2"}
    for index in range(2):
        with Group([worker("feed")], tmp_path, **settings, STEERJAX_PROCESS=str(index)) as group:
            assert group.wait(60) == [1]
            said = rf" 2 s .*127.0.0.1:\d+.*'process_id': {index}"
            assert re.search(said, group.output(0))


def test_one_process_starts_nothing():
    with connect({}) as processes:
        assert processes is ALONE
        processes.barrier("nobody else")
        processes.agree("nobody else", {"a": 1})
    with pytest.raises(TrainingError, match="as it was"), connect({}):
        raise TrainingError("as it was")


class FailingStore:
    """Looks at it fail as often as `failures` says, then there is news."""

    def __init__(self, failures: int):
        self.failures = failures

    def key_value_set(self, *_, **__):
        pass

    def key_value_dir_get(self, folder):
        self.failures -= 1
        if self.failures >= 0:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")
        return [(f"{folder}0", "process 0 failed")]


@pytest.mark.parametrize(("failures", "said"), [(4, "because process 0 failed"), (5, "because process 0 is gone")])
def test_a_failed_look_at_the_store_ends_nothing(monkeypatch, failures, said):
    """Only several in a row do."""
    monkeypatch.setattr(processes, "BEAT", 0.0)
    output, left = [], []
    monkeypatch.setattr(processes, "_say", output.append)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    one = Processes(State())
    one.index, one.count, one._client = 1, 2, FailingStore(failures)
    one._watch_others()
    assert left == [1]
    assert said in output[0]


class SilentStore(FailingStore):
    """Answers twice, then no more, as a process 0 that was stopped."""

    def key_value_dir_get(self, folder):
        self.failures -= 1
        if self.failures < 0:
            time.sleep(60)
        return []


def test_a_process_0_that_answers_nothing_is_named(monkeypatch):
    monkeypatch.setattr(processes, "BEAT", 0.01)
    monkeypatch.setattr(processes, "LOST", 0.1)
    output, left = [], []
    monkeypatch.setattr(processes, "_say", output.append)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    one = Processes(State())
    one.index, one.count, one._client = 1, 2, SilentStore(2)
    threading.Thread(target=one._watch_others, daemon=True).start()
    one._watch_first()
    assert left == [1]
    assert one._answers == 2
    assert "process 0 did not answer" in output[0]


class Signs(FailingStore):
    """A store that has these signs of life, and what is told."""

    def __init__(self, *signs):
        self.signs, self.told = signs, []

    def key_value_set(self, key, value, **_):
        self.told.append(value)

    def key_value_dir_get(self, folder):
        return [(f"{folder}{i}", sign) for i, sign in enumerate(self.signs)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (("9/6/step 6", "9/5/step 5", "9/6/step 6"), r"process 1 of 3 \(last at 'step 5'\) did not get on"),
        (("9/6/step 6", "8/5/step 5", "9/6/step 6"), r"process 1 of 3 \(last at 'step 5'\) gave no sign of life"),
        (("9/6/step 6", "9/6/step 6", "9/6/step 6"), ""),  # all are busy with the same
        (("9/6/step 6", "9/5/step 5", "9/7/step 7"), ""),  # one gets on
    ],
)
def test_one_that_stays_behind_is_named(monkeypatch, second, said):
    """Of three, seen twice within a hundred seconds; the limit of a wait is fifty."""
    clock = iter((0.0, 100.0))
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    one, seen = Processes(State(), 50), {}
    one.count, one._client = 3, Signs("8/6/step 6", "8/5/step 5", "8/6/step 6")
    if not said and second[1].endswith("6"):
        one._client.signs = ("8/6/step 6",) * 3
    one._find_lost(seen)
    one._client.signs = second
    one._find_lost(seen)
    assert len(one._client.told) == bool(said)
    assert re.search(said, "".join(one._client.told))
