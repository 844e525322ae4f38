"""Ctrl-C in `steerjax train`, as a terminal sends it: to the whole process group, at any moment of a run's life."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steerjax.bundle import open_bundle
from steerjax.report.records import read_metrics
from tests.helpers import assert_trees_close
from tests.interrupts import with_ctrl_c

SAVED, INTERRUPTED, AT_ONCE = 2, -signal.SIGINT, 128 + signal.SIGINT
TIMES = (
    "examples_per_second", "tokens_per_second", "unshared_tokens_per_second", "model_tflops_per_second_per_device",
)  # fmt: skip
RECIPE = """
from steerjax.config import default_config

def get_config():
    config = default_config()
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=4, row_length=2304)
    config.optimizer.update(schedule="constant")
    config.train.update(steps=10, evaluate_every=3, checkpoint_every=4)
    return config
"""


class Runs:
    """Starts runs of one recipe in a folder."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self._recipe = folder, folder / "recipe.py"
        self._recipe.write_text(RECIPE)
        python_path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        }  # fmt: skip

    def start(self, workdir: Path, output) -> subprocess.Popen:
        train = [sys.executable, "-m", "steerjax", "train", f"--config={self._recipe}", f"--workdir={workdir}"]
        return subprocess.Popen(
            with_ctrl_c(train), stdout=output, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
        )

    def interrupted(self, workdir: Path, *pauses: float) -> tuple[int, str]:
        """A run that is sent Ctrl-C after each of the pauses, if it is not over: its exit status and what it said."""
        log = self.folder / "log"
        with log.open("w") as output:
            process = self.start(workdir, output)
            try:
                for pause in pauses:
                    try:
                        process.wait(timeout=pause)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGINT)
                status = process.wait(timeout=300)
            finally:
                process.kill()
        return status, log.read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, repository) -> Runs:
    return Runs(tmp_path_factory.mktemp("interruption"), repository)


@pytest.fixture(scope="module")
def whole(runs) -> tuple[Path, float]:
    """A run that nobody interrupts, and how long it takes."""
    begun = time.monotonic()
    status, said = runs.interrupted(runs.folder / "whole")
    assert status == 0, said
    return runs.folder / "whole", time.monotonic() - begun


def records(workdir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(workdir / "metrics.jsonl")]


def files(workdir: Path) -> set[str]:
    """All names but those that differ from start to start."""
    found = {path.relative_to(workdir).as_posix() for path in workdir.rglob("*")}
    return {name for name in found if not name.startswith(("tensorboard/", "metrics.", "checkpoints/"))}


@pytest.mark.slow
def test_ctrl_c_at_random_moments(runs, whole):
    """Each run is interrupted up to three times, now and then twice in a row, and goes on to the same bits."""
    (uninterrupted, seconds), moments = whole, int(os.environ.get("STEERJAX_MOMENTS", "10"))
    seed = int(os.environ.get("STEERJAX_SEED", time.time_ns() % 10**6))
    print(f"STEERJAX_SEED={seed} STEERJAX_MOMENTS={moments}; a run takes {seconds:.1f} s")
    draw, left = random.Random(seed), moments
    while left > 0:
        workdir = runs.folder / "interrupted"
        shutil.rmtree(workdir, ignore_errors=True)
        for attempt in range(4):
            pauses = [draw.uniform(0, seconds)] if attempt < 3 and left > 0 else []
            if pauses and draw.random() < 0.25:
                pauses.append(draw.uniform(0, 0.5))
            status, said = runs.interrupted(workdir, *pauses)
            print(f"{', '.join(f'{pause:.2f} s' for pause in pauses) or 'to the end'}: status {status}")
            left -= bool(pauses)
            assert status in ((0, SAVED, INTERRUPTED, AT_ONCE) if pauses else (0,)), said
            assert "Traceback" not in said or "steerjax/" not in said, said  # Python's own start is not ours
            assert "Exception ignored" not in said, said
            assert ("is saved" in said) == (status == SAVED) or status in (INTERRUPTED, AT_ONCE), said
            if status == 0:
                break
        assert records(workdir) == records(uninterrupted)
        assert files(workdir) == files(uninterrupted)
        assert not [p for p in workdir.rglob("*") if p.name.endswith((".tmp", ".partial")) or "-tmp" in p.name]
        ours, expected = (open_bundle(folder / "checkpoints" / "10").params for folder in (workdir, uninterrupted))
        assert_trees_close(ours, expected, rtol=0)


@pytest.mark.slow
def test_ctrl_c_that_ends_the_reader_of_the_log_too(runs, tmp_path):
    """`steerjax train | tee log`: what is printed is lost, the checkpoint is not."""
    process = runs.start(tmp_path, subprocess.PIPE)
    try:
        while b"step 2/10" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == SAVED
    finally:
        process.kill()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
