"""What the comparison with checksums costs a resume.

    python benchmarks/verify.py [--layers 30] [--turns 5] [--folder SCRATCH]

`steerjax train` trains one step of a Llama (30 layers: 503M parameters, 5.6 GiB with two moments, 16 GB of memory) and
is killed. The same command is then started with and without `config.train.verify`, in turn, its checkpoint in the page
cache (warm) or not (cold), and killed when it says that it has resumed. `restore` is what it takes without comparison
from "opening the parameters" to there, `more` the median difference of whole starts over it. Writes
results/verify.json; the folder goes at the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    config.batch.rows, config.batch.row_length = 1, 1024
    config.optimizer.warmup_steps = 1
    config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = 10, 1, 0
    config.train.plots, config.train.trackers = False, ()
    return config
"""


def seconds_to(words: list[str], command: list[str]) -> list[float]:
    """When it said each of these, from its start; it is killed then."""
    begun, found = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith(words[len(found)]):
                found.append(time.perf_counter() - begun)
                if len(found) == len(words):
                    process.kill()
                    return found
    raise SystemExit(f"{' '.join(command)} ended before it said '{words[len(found)]}'")


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
    train = [sys.executable, "-m", "steerjax", "train", f"--config={recipe}", f"--workdir={run}"]
    seconds_to(["step 3/"], train)  # a step's checkpoint is whole before the next one is written
    step = max((run / "checkpoints").glob("[0-9]"))
    written = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    starts, restores = {}, {}
    for turn in range(turns):
        for state, prepare in (("warm", remember), ("cold", forget)):
            for verify in (True, False) if turn % 2 else (False, True):
                prepare(step)
                command = [*train, f"--config.train.verify={verify}"]
                opening, resumed = seconds_to(["opening the parameters", "resumed at"], command)
                starts.setdefault((state, verify), []).append(resumed)
                if not verify:
                    restores.setdefault(state, []).append(resumed - opening)
    found = {"gigabytes": round(written / 2**30, 2), "turns": turns}
    for state, restore in restores.items():
        more = [a - b for a, b in zip(starts[state, True], starts[state, False], strict=True)]
        found[state] = {
            "restore": round(statistics.median(restore), 2),
            "start": round(statistics.median(starts[state, False]), 2),
            "more seconds": [round(each, 2) for each in more],
            "more": round(statistics.median(more) / statistics.median(restore), 3),
        }
    return found


def main() -> None:
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
