"""What the comparison with checksums costs a resume.

    python benchmarks/verify.py [--layers 30] [--turns 5] [--folder SCRATCH]

`steerjax train` trains two steps of a Llama (30 layers: 503M parameters, 5.3 GiB with two moments, 16 GB of memory) and
is killed. The same command is then started again and again, its checkpoint in the page cache (warm) or not (cold), and
ends when it has resumed. Each start times its own restore and its own comparison. Writes results/verify.json; the
folder goes at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from turns import RESULTS, machine

from steerjax.report.records import write_json

RECIPE = """
from steerjax.config import default_config


def get_config():
    config = default_config()
    config.objectives = ("regression",)
    config.data.train = ("embedded:helpsteer",)
    config.data.on_bad_row = "skip"
    model = config.model
    model.hidden_size, model.intermediate_size, model.num_layers = 1024, 4096, {layers}
    model.num_heads = model.num_kv_heads = 16
    config.batch.rows, config.batch.row_length = 1, 256
    config.optimizer.warmup_steps = 1
    config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = 10, 1, 0
    config.train.plots, config.train.trackers = False, ()
    return config
"""


class Resumed(Exception):
    """All that is timed is done."""


def resume(words: list[str]) -> None:
    """In a process of its own: `steerjax train` up to its first step; prints the seconds of restore and comparison."""
    from steerjax import train as command
    from steerjax.bundle.store import CheckpointStore
    from steerjax.training import resume, train

    seconds = {}

    def timed(name, function):
        def call(*arguments, **options):
            begun = time.perf_counter()
            found = jax.block_until_ready(function(*arguments, **options))
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - begun
            return found

        return call

    def loop(*_):
        raise Resumed

    CheckpointStore.restore = timed("restore", CheckpointStore.restore)
    train.set_damaged_aside = timed("before", train.set_damaged_aside)
    resume.set_damaged_aside = timed("after", resume.set_damaged_aside)
    train.loop = loop
    try:
        sys.argv[1:] = words
        command.main()
    except Resumed:
        print(json.dumps(seconds))


def kill_at(word: str, command: list[str]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith(word):
                process.kill()
                return
    raise SystemExit(f"{' '.join(command)} ended before it said '{word}'")


def forget(folder: Path) -> None:
    """Drops its files from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def measured(folder: Path, layers: int, turns: int) -> dict:
    recipe, run = folder / "recipe.py", folder / "run"
    recipe.write_text(RECIPE.format(layers=layers))
    words = [f"--config={recipe}", f"--workdir={run}"]
    # A step's checkpoint is whole before the next one is written.
    kill_at("step 3/", [sys.executable, "-m", "steerjax", "train", *words])
    step = max((run / "checkpoints").glob("[0-9]"))
    written = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    found = {"gigabytes": round(written / 2**30, 2), "turns": turns}
    for state, prepare in (("warm", remember), ("cold", forget)):
        restores, comparisons = [], []
        for _ in range(turns):
            prepare(step)
            said = subprocess.run([sys.executable, __file__, "--resume", *words], stdout=subprocess.PIPE, check=True)
            seconds = json.loads(said.stdout.splitlines()[-1])
            restores.append(seconds["restore"])
            comparisons.append(seconds["before"] + seconds["after"])
        found[state] = {
            "restore": [round(each, 2) for each in restores],
            "comparison": [round(each, 2) for each in comparisons],
            "more": round(statistics.median(c / r for c, r in zip(comparisons, restores, strict=True)), 3),
        }
    return found


def main() -> None:
    if sys.argv[1:2] == ["--resume"]:
        return resume(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, metavar="N")
    parser.add_argument("--turns", type=int, default=5, metavar="N")
    parser.add_argument("--folder", metavar="SCRATCH", help="default: the system's for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = {"machine": machine(), **measured(Path(folder), options.layers, options.turns)}
    write_json(RESULTS / "verify.json", found)
    print(found)


if __name__ == "__main__":
    main()
