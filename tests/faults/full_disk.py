"""Runs on disks of many sizes: `unshare --mount python -m tests.faults.full_disk FOLDER KIB ...`, for test_machine.py.

A line of JSON for each size: how the run ended that met the full disk, what it left, and the run that goes on when
there is space.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import tests.conftest  # noqa: F401 - the same devices and compile cache
from steerjax.bundle import open_bundle
from steerjax.config import default_config, resolve
from steerjax.errors import reported_errors
from steerjax.report.records import read_metrics
from steerjax.training.train import train
from tests.reward_models import write_rows

STEPS = 6
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def experiment(folder: Path, **settings):
    """A tiny run that saves every other step."""
    rows = [{"prompt": f"Q{i}?", "response": "a b", **dict.fromkeys(ATTRIBUTES, i % 5)} for i in range(12)]
    config = default_config()
    config.data.train = (str(write_rows(folder / "rows.jsonl", rows)),)
    config.data.validation_fraction = 0.25
    config.model.update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=8, row_length=128)
    config.compute.attention_chunk = 64
    config.optimizer.update(schedule="constant", warmup_steps=0)
    config.train.update(
        {"steps": STEPS, "checkpoint_every": 2, "plots": False, "trackers": ("tensorboard",)} | settings
    )
    return resolve(config.to_dict())


def status_of(command, *arguments) -> tuple[int, str, float]:
    """Exit status, standard error and seconds of a command in this process."""
    said, begun, status = io.StringIO(), time.monotonic(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            with reported_errors():
                command(*arguments)
        except SystemExit as end:
            status = end.code
    return status, said.getvalue(), time.monotonic() - begun


def saved(workdir: Path) -> list[int]:
    """Steps whose checkpoints can be read whole."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    for step in steps:
        jax.block_until_ready(open_bundle(workdir / "checkpoints" / str(step)).params)
    return sorted(steps)


def same(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same losses and the same last parameters, bit for bit."""
    first, second = (jax.tree.leaves(open_bundle(path / "checkpoints" / str(STEPS)).params) for path in (one, other))
    losses = [
        [(r["step"], r["split"], r["loss"]) for r in read_metrics(path / "metrics.jsonl")] for path in (one, other)
    ]
    return losses[0] == losses[1] and all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", disk], check=True)


def main(folder: str, *sizes: str) -> None:
    run, whole, disk = experiment(Path(folder)), Path(folder) / "whole", Path(folder) / "disk"
    disk.mkdir()
    train(run, whole)
    for size in sizes:
        mount(disk, f"size={size}k")
        status, said, seconds = status_of(train, run, disk / "run")
        sound = saved(disk / "run")
        moved = Path(folder) / f"moved{size}"  # to where there is space
        shutil.copytree(disk / "run", moved)
        again, words, _ = status_of(train, run, moved)
        found = {"size": int(size), "status": status, "said": said, "seconds": seconds, "saved": sound, "again": again}
        print(json.dumps(found | {"words": words, "same": again == 0 and same(moved, whole)}), flush=True)
        subprocess.run(["umount", "--lazy", disk], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
