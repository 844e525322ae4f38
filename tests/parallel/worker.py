"""What a process of the tests in test_processes.py does: `python -m tests.parallel.worker WHAT [ARGUMENTS]`."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.sharding import NamedSharding

from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.processes import Processes, connect
from steerjax.parallel.rules import partition_spec


class Rows(NamedTuple):
    """A batch of nothing but tokens."""

    tokens: object


def train(processes: Processes, recipe: str, workdir: str, *meshes: str) -> None:
    """Trains once for each mesh, such as `fsdp=2,tensor=2`; says which files this process wrote outside checkpoints/.

    With FAIL_AT=PROCESS:STEP in the environment, that process fails there.
    """
    from steerjax.config import resolve
    from steerjax.data.batch import BatchPlan
    from steerjax.training import train as training

    wrote = []

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
            path, mode = arguments[:2]
            if path.startswith(workdir) and "/checkpoints/" not in path and set(mode) & set("wax+"):
                wrote.append(path)

    sys.addaudithook(audit)
    process, _, step = os.environ.get("FAIL_AT", "-1:0").partition(":")
    if processes.index == int(process):
        rows = BatchPlan.step_rows

        def fail(self, number):
            if number == int(step):
                raise ZeroDivisionError("made to fail")
            return rows(self, number)

        BatchPlan.step_rows = fail
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for mesh in meshes:
        config = module.get_config()
        config.mesh.update({"data": 1} | {a: int(n) for a, n in (axis.split("=") for axis in mesh.split(","))})
        training.train(resolve(config.to_dict()), Path(workdir) / mesh, processes)
    print("wrote", wrote, flush=True)


def feed(processes: Processes) -> None:
    """Which of eight rows this process builds for a batch over all devices, and barriers that all come to."""
    from steerjax.data.batch import Feeder

    class Build:
        row_length, built = 4, []

        def __call__(self, row):
            self.built.extend(row)
            return Rows(np.full(4, sum(row), np.int32))

    mesh, build = make_mesh(MeshConfig()), Build()
    batch = Feeder(build, lambda axes: NamedSharding(mesh, partition_spec(axes)))([(i,) for i in range(8)])
    print("built", sorted(build.built), int(jax.jit(lambda x: x.sum())(batch.tokens)), flush=True)
    for _ in range(2):
        processes.barrier("again")
        processes.agree("same", {"a": {"b": 1}, "c": None})


def aside(processes: Processes, checkpoints: str) -> None:
    """Sets damaged checkpoints aside; says which files this process has read, and which checkpoints it finds then."""
    from steerjax import checksums
    from steerjax.parallel.mesh import make_any
    from steerjax.training.resume import set_damaged_aside

    folder, read, checksum = Path(checkpoints), [], checksums.checksum
    checksums.checksum = lambda path: read.append(path.relative_to(folder).as_posix()) or checksum(path)
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        set_damaged_aside(folder, processes, make_any(mesh), whole=True)
    print("read", sorted(read), "left", sorted(step.name for step in folder.iterdir()), flush=True)


def late(processes: Processes) -> None:
    """Process 1 is elsewhere when the others meet."""
    if processes.index == 1:
        processes.at("reading the rows")
        time.sleep(60)
    processes.barrier("save step 8", 2)


def stuck(processes: Processes) -> None:
    """Gets on no more."""
    print("stuck", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    with connect() as processes:
        tasks = {"train": train, "feed": feed, "aside": aside, "late": late, "stuck": stuck}
        tasks[sys.argv[1]](processes, *sys.argv[2:])
