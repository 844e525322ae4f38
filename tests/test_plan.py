"""The command: flags, messages, exit status. Real compilations are in tests/planning."""

import subprocess
import sys

import pytest

from steerjax import plan
from steerjax.config import Experiment
from steerjax.planning import compile as compiling
from steerjax.planning import topology as topologies
from tests.planning.test_fit import compiled

COMMAND = [sys.executable, "-m", "steerjax.plan"]


def run(repository, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], cwd=repository, capture_output=True, text=True, timeout=60)


def test_help_says_what_is_set_and_does_not_load_jax(repository):
    done = run(repository, "--help")
    assert "--topology" in done.stdout
    assert "JAX_PLATFORMS=cpu" in done.stdout
    code = "import sys, steerjax.plan; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0


@pytest.mark.parametrize(
    ("topology", "message"),
    [("v5p-256", "not a machine that can be planned; cure: one of v5e:4x4"), ("v6e:4", "v6e has 2 axes")],
)
def test_an_unknown_machine_is_an_error(repository, topology, message):
    done = run(repository, "--config", "configs/rm_llama3_8b.py", "--topology", topology)
    assert done.returncode == 2
    assert message in done.stderr
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
    assert plan.main(Experiment(), "v5e:2x4", True, None) == 0
    assert "fits: 10.00 of 15.75 GiB a device, 5% of them kept free" in (out := capsys.readouterr().out)
    assert "verdict: fits v5e:2x4 (8 devices)" in out

    machine += [40.0, 15.5, 14.0]  # 15.5 is within the memory, and not within the memory less the reserve
    assert plan.main(Experiment(), "v5e:2x4", True, None) == 1
    assert (out := capsys.readouterr().out).count("DOES NOT FIT") == 2
    assert out.endswith("it fits with\n  --config.mesh.data=1 --config.mesh.fsdp=8 --config.compute.remat=dots\n")

    machine += [40.0] * 4
    assert plan.main(Experiment(), "v5e:2x4", True, None) == 1
    assert "neither remat, micro-batches nor fsdp make it" in capsys.readouterr().out
