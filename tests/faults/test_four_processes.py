"""Four processes of a run, and one that fails in each way: it is named, all end, and the run goes on to the same bits.

STEERJAX_SLOW=1 python -m pytest tests/faults/test_four_processes.py prints how long each took.
"""

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from steerjax.report.records import read_metrics
from tests.parallel.test_processes import Group, parameters

STEPS, EVERY, LIMIT = 60, 10, 60  # the limit: seconds from the fault to the last process's end
RECIPE = """
from steerjax.config import default_config

def get_config():
    config = default_config()
    config.data.train = ("rows.jsonl",)
    config.data.validation_fraction = 0.25
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=4)
    config.batch.update(rows=8, row_length=128)
    config.compute.attention_chunk = 64
    config.mesh.update(data=1, fsdp=4)
    config.train.update(steps={steps}, checkpoint_every={every}, plots=False)
    return config
"""
FAULTS = (
    ("kill", 0), ("kill", 2), ("stop", 0), ("stop", 2), ("slow", 0), ("slow", 2), ("data", 2), ("disk", 0), ("disk", 2),
)  # fmt: skip
STACKS = ("Traceback", "*** Check failure stack trace", "JaxRuntimeError", "XlaRuntimeError")


class Runs:
    def __init__(self, folder: Path):
        self.folder, self.recipe = folder, folder / "recipe.py"
        self.recipe.write_text(RECIPE.format(steps=STEPS, every=EVERY))
        names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        for place in ("same", "other"):
            (folder / place).mkdir()
            with (folder / place / "rows.jsonl").open("w") as file:
                for i in range(40):
                    row = {"prompt": f"Q{i // 2}?", "response": "a b", **dict.fromkeys(names, i % (3 + len(place) % 3))}
                    file.write(json.dumps(row) + "\n")

    def start(self, workdir: Path, victim: int = -1, fault: str = "") -> Group:
        command = [sys.executable, "-m", "tests.faults.process_worker", self.recipe, workdir, self.folder]
        words = [[str(word) for word in command]] * 4
        if fault:
            words[victim] = ["env", f"FAULT={fault}:{EVERY + 5}", *words[victim]]
        workdir.parent.mkdir(exist_ok=True)
        return Group(words, workdir.parent, STEERJAX_WAIT_SECONDS="20")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    """A run without a fault."""
    workdir = runs.folder / "whole" / "run"
    with runs.start(workdir) as group:
        assert group.wait() == [0] * 4, group.output(0)
    return workdir


def inject(group: Group, workdir: Path, what: str, victim: int) -> float:
    """Waits until the fault is there; since when."""
    if what == "data":
        group.wait_for(victim, "")
        while not any("error" in group.output(i) for i in range(4)):
            time.sleep(0.1)
        return time.monotonic()
    end = time.monotonic() + 240
    while not (workdir / "checkpoints" / str(EVERY)).is_dir():
        assert time.monotonic() < end, group.output(0)
        time.sleep(0.02)
    if what in ("kill", "stop"):
        group.processes[victim].send_signal(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    else:  # it is about to come
        while read_metrics(workdir / "metrics.jsonl")[-1]["step"] < EVERY + 4:
            time.sleep(0.05)
    return time.monotonic()


@pytest.mark.faults
@pytest.mark.parametrize(("what", "victim"), FAULTS)
def test_one_of_four_fails(runs, whole, tried, what, victim, capsys):
    workdir = runs.folder / f"{what}{victim}" / "run"
    with runs.start(workdir, victim, what if what in ("slow", "data", "disk") else "") as group:
        since = inject(group, workdir, what, victim)
        left = [i for i in range(4) if not (what in ("stop", "kill") and i == victim)]
        statuses = [group.processes[i].wait(max(1, LIMIT + since - time.monotonic())) for i in left]
        took = time.monotonic() - since
        if what == "stop":
            group.processes[victim].send_signal(signal.SIGCONT)
            assert group.processes[victim].wait(LIMIT) != 0, group.output(victim)
        outputs = [group.output(i) for i in range(4)]
    unnamed = [
        (i, status, outputs[i])
        for i, status in zip(left, statuses, strict=True)
        if status not in (1, 2)
        or not re.search(rf"error: .*process {victim} of 4|error: process {i} of 4\b.*process {victim}\b", outputs[i])
        or any(words in outputs[i] for words in STACKS)
    ]
    tried("one of four processes", what, 1, bool(unnamed))
    if what != "data":  # which is refused before anything is there
        with runs.start(workdir) as group:
            assert group.wait() == [0] * 4, group.output(0)
            assert "resumed at step" in group.output(0)
        ours, expected = parameters(workdir, STEPS), parameters(whole, STEPS)
        for name, value in expected.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        losses = [[(r["step"], r["loss"]) for r in read_metrics(w / "metrics.jsonl")] for w in (workdir, whole)]
        assert losses[0] == losses[1]
    assert not unnamed
    with capsys.disabled():
        print(f"\n{what} of process {victim}: named and all ended within {took:.0f} s, exit statuses {statuses}")
