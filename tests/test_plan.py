"""The command: flags, messages, exit status. Real compilations are in tests/planning."""

import os
import subprocess
import sys

import pytest

from steerjax import plan
from steerjax.config import resolve
from steerjax.planning import compile as compiling
from steerjax.planning import topology as topologies
from tests.planning.test_fit import compiled
from tests.refusals import says

COMMAND = [sys.executable, "-m", "steerjax.plan"]


def run(repository, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], cwd=repository, capture_output=True, text=True, timeout=60)


def test_help_says_what_is_set(repository):
    done = run(repository, "--help")
    assert "--topology" in done.stdout
    assert "JAX_PLATFORMS=cpu" in done.stdout


def test_no_accelerator_of_this_machine_is_looked_for(repository):
    """jax is loaded with the recipe, before the topology is known, and with another platform in its environment."""
    code = (
        "import jax; from steerjax import plan; from steerjax.config import resolve\n"
        "try: plan.plan(resolve({'mesh': {'data': 3}}), 'v5e:2x4', False, None)\n"
        "except Exception: print(jax.config.jax_platforms)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True)
    assert done.stdout == b"cpu\n", done.stderr


def test_an_unknown_machine_is_an_error(repository):
    done = run(repository, "--config", "configs/rm_llama3_8b.py", "--topology", "v5p-256")
    assert done.returncode == 2
    says(done.stderr, "--topology", "v5p-256", cure="v5e:4x4")
    assert "Traceback" not in done.stderr


@pytest.fixture
def machine(monkeypatch):
    """A compiler that needs so many GiB a device as the list says, attempt by attempt."""
    import jax

    needs: list[float] = []

    def compile_step(experiment, devices):
        assert len(devices) == 8
        return compiled(needs.pop(0) * 2**30)

    monkeypatch.setattr(compiling, "compile_step", compile_step)
    monkeypatch.setattr(topologies, "prepare_environment", lambda topology: None)
    monkeypatch.setattr(topologies, "topology_devices", lambda topology: jax.devices())
    return needs


def test_verdicts(machine, capsys):
    machine += [10.0]
    assert plan.plan(resolve({}), "v5e:2x4", True, None) == 0
    assert "fits: 10.00 of 15.75 GiB a device, 5% of them kept free" in (out := capsys.readouterr().out)
    assert "verdict: fits v5e:2x4 (8 devices)" in out

    machine += [40.0, 15.5, 14.0]  # 15.5 is within the memory, and not within the memory less the reserve
    assert plan.plan(resolve({}), "v5e:2x4", True, None) == 1
    assert (out := capsys.readouterr().out).count("DOES NOT FIT") == 2
    assert out.endswith("it fits with\n  --config.mesh.data=1 --config.mesh.fsdp=8 --config.compute.remat=full\n")

    machine += [40.0]
    assert plan.plan(resolve({}), "v5e:2x4", False, None) == 1
    assert not machine, "one compilation"
    capsys.readouterr()

    machine += [40.0] * 3
    assert plan.plan(resolve({}), "v5e:2x4", True, None) == 1
    assert "neither remat, micro-batches nor fsdp make it" in capsys.readouterr().out
