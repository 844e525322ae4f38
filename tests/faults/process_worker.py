"""One process of tests/faults/test_four_processes.py: `python -m tests.faults.process_worker RECIPE WORKDIR FOLDER`.

FAULT=WHAT:STEP in the environment is what fails in it, from that step on: `slow` (it hangs), `disk` (it can write no
large file) or `data` (its copy of the rows is another, from the start).
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
import time
from pathlib import Path


def fail(what: str, step: int) -> None:
    """Arranges for the fault."""
    from steerjax.data.batch import BatchPlan

    rows = BatchPlan.step_rows

    def faulty(self, number: int):
        if number >= step and what == "slow":
            time.sleep(600)
        if number >= step and what == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return rows(self, number)

    BatchPlan.step_rows = faulty


def main(recipe: str, workdir: str, folder: str) -> None:
    from steerjax.config import resolve
    from steerjax.errors import reported_errors
    from steerjax.parallel.processes import connect
    from steerjax.signals import ends_at_once
    from steerjax.training.train import train

    what, _, step = os.environ.get("FAULT", "none:0").partition(":")
    os.chdir(Path(folder) / ("other" if what == "data" else "same"))
    fail(what, int(step))
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ends_at_once(), reported_errors(), connect() as processes:
        train(resolve(module.get_config().to_dict()), Path(workdir), processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
