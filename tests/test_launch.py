"""The scripts of launch/. local.sh trains for real in tests/parallel/test_processes.py."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jax.sharding import AbstractMesh

import steerjax
from steerjax.config import resolve
from steerjax.parallel.mesh import AXES, mesh_shape
from steerjax.training.input import check_batch

SCRIPTS = ("local.sh", "slurm.sh", "tpu_vm.sh")
TPU = {"TPU_NAME": "pod", "ZONE": "us-east5-a", "ACCELERATOR": "v5p-256"}


@pytest.fixture
def launch(repository) -> Path:
    return repository / "launch"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_bash_and_explain_themselves(launch, name):
    assert os.access(launch / name, os.X_OK)
    assert run("bash", "-n", launch / name).returncode == 0
    bare = run(launch / name)
    assert bare.returncode == 64
    assert f"launch/{name}" in bare.stderr


def test_local_says_what_it_would_run(launch):
    lines = run(launch / "local.sh", "--dry-run", 2, 4, "--", "python", "-m", "steerjax.train").stdout.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines):
        for part in (
            f"STEERJAX_PROCESS={i}",
            "STEERJAX_PROCESSES=2",
            "STEERJAX_CPU_DEVICES=4",
            "STEERJAX_COORDINATOR=",
        ):
            assert f"{part}" in line
        assert line.endswith("python -m steerjax.train")


def test_local_prefixes_lines_and_ends_with_the_first_failure(launch):
    script = "echo out; echo err >&2; if [ $STEERJAX_PROCESS = 1 ]; then exit 7; fi; sleep 1"
    done = run(launch / "local.sh", 3, "--", "bash", "-c", script)
    assert done.returncode == 7
    assert sorted(done.stdout.splitlines()) == sorted(f"[{i}] {word}" for i in range(3) for word in ("out", "err"))
    assert re.search("process 1 .*status 7", done.stderr)


def test_local_ends_what_does_not_end_by_itself(launch, tmp_path):
    script = tmp_path / "local.sh"
    script.write_text((launch / "local.sh").read_text().replace("GRACE=60", "GRACE=1"))
    begin = time.time()
    done = run("bash", script, 2, "--", "bash", "-c", "if [ $STEERJAX_PROCESS = 1 ]; then exit 3; fi; exec sleep 50")
    assert done.returncode == 3
    assert time.time() - begin < 20


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(launch, sent):
    """As SIGTERM, which training answers by saving."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(2)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    command = [launch / "local.sh", "2", "--", sys.executable, "-c", code]
    # A shell cannot trap what was ignored when it started, as SIGINT is for background jobs (nohup, some CI).
    heeded = functools.partial(signal.signal, sent, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        process.send_signal(sent)
        output, _ = process.communicate(timeout=30)
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
    assert process.returncode == 2


def test_slurm(launch):
    done = run(launch / "slurm.sh", "--dry-run", "python", "-m", "steerjax.train", "--workdir=/data/a b")
    assert done.stdout.startswith("srun --kill-on-bad-exit=1 --label python -m steerjax.train")
    options = [line.split()[1] for line in (launch / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--gpus-per-node=8", "--signal=TERM@120", "--requeue"} <= set(options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create"], ["queued-resources create pod --node-id=pod", "--accelerator-type=v5p-256", "v2-alpha-tpuv5 "]),
        (["status"], ["queued-resources describe pod"]),
        (["setup"], ["tpu-vm scp", "--worker=all", "pip", "tpu"]),
        (["run", "python", "-m", "steerjax.train"], ["tpu-vm ssh pod", "--worker=all", "steerjax.train"]),
        (["stop"], ["tpu-vm ssh pod", "--worker=all", "TERM"]),
        (["delete"], ["queued-resources delete pod", "--force"]),
    ],
)  # fmt: skip
def test_tpu_vm_prints_its_commands(launch, arguments, words):
    done = run(launch / "tpu_vm.sh", "--dry-run", *arguments, **TPU)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout
    assert "--zone=us-east5-a" in done.stdout


def test_tpu_vm_wants_to_know_which(launch):
    done = run(launch / "tpu_vm.sh", "--dry-run", "create", **TPU | {"ACCELERATOR": "v9-1"})
    assert done.returncode == 64
    assert re.search("RUNTIME.*v9-1", done.stderr)


def fits(arguments: list[str], devices: int) -> None:
    """The recipe's batch, as the command line has it, can be cut over so many devices."""
    given = dict(argument.removeprefix("--").split("=") for argument in arguments)
    config = steerjax.recipe(given.pop("config"))
    changes = {key.removeprefix("config."): int(value) for key, value in given.items() if key.startswith("config.")}
    config.update_from_flattened_dict(changes)
    e = resolve(config.to_dict())
    check_batch(e.batch, AbstractMesh(mesh_shape(e.mesh, devices), AXES))


def test_slurms_example_fits_its_nodes(launch):
    text = (launch / "slurm.sh").read_text()
    nodes, gpus = (int(re.search(rf"--{what}=(\d+)", text)[1]) for what in ("nodes", "gpus-per-node"))
    fits(re.findall(r"--config\S*=\S+", text.replace("--config ", "--config=")), nodes * gpus)


@pytest.mark.parametrize(
    ("name", "chips", "hosts"), [("gke.yaml", "google.com/tpu", 16), ("gke_gpu.yaml", "nvidia.com/gpu", 2)]
)
def test_job_sets(launch, name, chips, hosts):
    """What GKE needs is there, and the numbers fit each other. (Checked by hand against the JobSet's schema.)"""
    job_set = yaml.safe_load((launch / name).read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "steerjax.train"]
    assert container["resources"]["limits"][chips] in (4, 8)
    fits(container["args"], hosts * container["resources"]["limits"][chips])
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    environment = {e["name"]: e for e in container["env"]}
    if chips == "google.com/tpu":
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert eval(topology.replace("x", "*")) == hosts * container["resources"]["limits"][chips]
    else:
        name, job_name = job_set["metadata"]["name"], job["name"]
        assert environment["STEERJAX_COORDINATOR"]["value"].startswith(f"{name}-{job_name}-0-0.{name}:")
        assert environment["STEERJAX_PROCESSES"]["value"] == str(hosts)
        assert "job-completion-index" in str(environment["STEERJAX_PROCESS"])
