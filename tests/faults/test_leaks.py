"""Memory and descriptors stay level however long a run or an annotation takes.

STEERJAX_LEAK_SECONDS (120) is how long the run trains; STEERJAX_LEAK_ROWS (5000) how many rows are annotated.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.tiny_runs import environment, write_recipe
from tests.reward_models import reward_folder

SLOPE = 1.0  # MiB per 1,000 steps or rows
pytestmark = pytest.mark.faults


def measured(command: list[str], log: Path, place, surroundings: dict, seconds: float) -> np.ndarray:
    """[n, 3]: steps or rows that are done (`place()` says), resident MiB and descriptors, twice a second."""
    found, begun = [], time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=surroundings)
        while process.poll() is None:
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
            except OSError:
                break
            found.append((place(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20, descriptors))
            if time.monotonic() - begun > seconds:
                process.terminate()
                break
            threading.Event().wait(0.5)
        process.wait(120)
    return np.array(found, np.float64)


def check_level(found: np.ndarray) -> int:
    """The second half of what was done; fails where memory or descriptors rose in it. Returns what was done."""
    done = found[:, 0].max()
    late = found[found[:, 0] > done / 2]
    assert len(late) > 20, f"{done} in all: too short to tell"
    slope = np.polyfit(late[:, 0] / 1000, late[:, 1], 1)[0]
    print(f"{done:.0f} done, {slope:+.2f} MiB per 1,000, {late[0, 1]:.0f} to {late[-1, 1]:.0f} MiB, "
          f"{late[0, 2]:.0f} to {late[-1, 2]:.0f} descriptors")  # fmt: skip
    assert slope < SLOPE
    assert np.median(late[-10:, 2]) <= np.median(late[:10, 2]) + 2
    return int(done)


def test_training(tmp_path, repository, tried):
    recipe, workdir = write_recipe(tmp_path, steps=10**6), tmp_path / "run"
    command = [sys.executable, "-m", "steerjax", "train", f"--config={recipe}", f"--workdir={workdir}",
               "--config.train.checkpoint_every=500", "--config.train.evaluate_every=500"]  # fmt: skip

    def place() -> int:
        with contextlib.suppress(OSError, IndexError), (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            return json.loads(file.read().splitlines()[-2])["step"]  # the last may be half written
        return 0

    seconds = float(os.environ.get("STEERJAX_LEAK_SECONDS", "120"))
    found = measured(command, tmp_path / "log", place, environment(tmp_path, repository), seconds)
    tried("steps trained", "level memory", check_level(found))


def test_annotation(tmp_path, repository, tried):
    folder, rows = reward_folder(tmp_path / "model", context=256), int(os.environ.get("STEERJAX_LEAK_ROWS", "5000"))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n in range(rows):
            file.write(json.dumps({"prompt": f"What is {n}?", "response": "a number " * (n % 7 + 1)}) + "\n")
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "steerjax", "annotate", f"--model={folder}", f"--input={tmp_path / 'rows.jsonl'}",
               f"--output={output}", "--template=extra_id", "--chunk-rows=200"]  # fmt: skip

    def place() -> int:
        return max((file.read_bytes().count(b"\n") for file in tmp_path.glob("*out.jsonl*partial*")), default=0)

    found = measured(command, tmp_path / "log", place, environment(tmp_path, repository), 3600)
    assert output.read_bytes().count(b"\n") == rows, (tmp_path / "log").read_text()
    tried("rows annotated", "level memory", check_level(found))
