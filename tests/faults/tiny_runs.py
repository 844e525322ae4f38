"""Runs of seconds: a recipe, its data, and what must be the same of two of them."""

import json
import os
import random
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.faults.forks import Forks
from tests.training.test_interruption import files, records

STEPS = 8
ENDED = (0, 2, -2, -9, -15, 128 + 2, 128 + 15)  # exit statuses of a run that was killed or asked to stop
RECIPE = """
from steerjax.config import default_config

def get_config():
    config = default_config()
    config.data.train = ({data!r},)
    config.model.update(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1)
    config.batch.update(rows=2, row_length=256)
    config.optimizer.update(schedule="constant")
    config.train.update(steps={steps}, evaluate_every=3, checkpoint_every=2)
    return config
"""


def write_recipe(folder: Path, steps: int = STEPS) -> Path:
    """With its rows, in the folder."""
    draw = random.Random(0)
    rows = [
        {
            "prompt": f"What is {n // 2}?",
            "response": "a number " * draw.randrange(1, 9),
            "helpfulness": draw.randrange(5),
        }
        for n in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.py").write_text(RECIPE.format(data=str(folder / "rows.jsonl"), steps=steps))
    return folder / "recipe.py"


def environment(folder: Path, repository: Path) -> dict[str, str]:
    """Of processes that share what they compile."""
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


class TinyRuns:
    """Starts runs of one recipe; `whole` is one that nobody disturbs, `seconds` how long it takes."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self._recipe = folder, write_recipe(folder)
        self._forks = Forks(environment(folder, repository))
        for name in ("first", "whole"):  # the first compiles
            begun, self.whole = time.monotonic(), folder / name
            status, said = self.run(self.whole)
            assert status == 0, said
            self.seconds = time.monotonic() - begun

    def start(self, workdir: Path, log: Path) -> int:
        return self._forks.start(["train", f"--config={self._recipe}", f"--workdir={workdir}"], log)

    def wait(self, process: int) -> int:
        return self._forks.wait(process)

    def run(self, workdir: Path, number: int | None = None, pause: float = 0.0) -> tuple[int, str]:
        """A run that is sent a signal after a pause: its exit status and what it said."""
        log = self.folder / f"{workdir.name}.log"
        log.write_text("")  # a process may be killed before it has one
        process = self.start(workdir, log)
        if number is not None:
            time.sleep(pause)
            os.kill(process, number)
        return self.wait(process), log.read_text()

    def close(self) -> None:
        self._forks.close()


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name: parameters and the training state."""
    found = {item: ocp.PyTreeCheckpointer().restore(checkpoint / item) for item in ("params", "training")}
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def differences(workdir: Path, expected: Path, unevaluated: bool = False) -> list[str]:
    """What of a finished run is not as in the other: records, files, arrays bit for bit, leftovers.

    A kill in its removal may leave a checkpoint more. One that a signal caused has no validation loss; if it is the
    best (`unevaluated`), it goes when it is old.
    """
    found = []
    if records(workdir) != records(expected):
        found.append("records of metrics.jsonl")
    found += sorted(files(workdir) ^ files(expected))
    here, there = ({path.name for path in (run / "checkpoints").iterdir()} for run in (workdir, expected))
    wanted = sorted(there, key=int)[-2:] if unevaluated else there
    found += [f"checkpoint {name} is missing" for name in wanted if name not in here]
    ours, theirs = (arrays(run / "checkpoints" / str(STEPS)) for run in (workdir, expected))
    found += sorted(ours.keys() ^ theirs.keys())
    found += [name for name in ours.keys() & theirs.keys() if ours[name].tobytes() != theirs[name].tobytes()]
    left = [path for path in workdir.rglob("*") if any(sign in path.name for sign in (".partial", ".tmp", "-tmp"))]
    return found + [str(path) for path in left if "compile_cache" not in path.parts]
