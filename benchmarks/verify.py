"""What the comparison with checksums costs of a restore.

    python benchmarks/verify.py [--gigabytes 6] [--folder SCRATCH]

A checkpoint of so many random bytes is written as training writes one, then restored by `CheckpointStore.restore` and
read by `bundle.verify.damage`, warm and, dropped from the page cache before, cold: there the comparison comes first,
and the restore finds the files in memory. The medians of three. Writes results/verify.json; the folder goes at the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from turns import RESULTS, machine

from steerjax.bundle.store import CheckpointStore
from steerjax.bundle.verify import damage
from steerjax.report.records import write_json

LAYERS, COLUMNS = 8, 1024


def seconds(do: Callable[[], object]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def forget(folder: Path) -> None:
    """Drops its files from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, gigabytes: float) -> dict:
    """Parameters and two moments, a third of the bytes each."""
    random, one = np.random.default_rng(0), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = (LAYERS, round(gigabytes * 2**30 / 3 / 4 / LAYERS / COLUMNS), COLUMNS)
    names = {"llama": {"layers": {"w": 0}}}, {"m": 0, "v": 0}
    like = [jax.tree.map(lambda _: jax.ShapeDtypeStruct(shape, np.float32, sharding=one), tree) for tree in names]

    def filled(tree):
        return jax.tree.map(lambda x: jax.device_put(random.standard_normal(x.shape, x.dtype), x.sharding), tree)

    step = folder / "checkpoints" / "1"
    with CheckpointStore(step.parent, 2) as store:
        found = {"save": [seconds(lambda: (store.save(*map(filled, like), 1, {}, None), store.wait()))]}

        def restore():
            jax.block_until_ready(store.restore(1, *like))

        def compare():
            assert not damage(step)

        for _ in range(3):
            for name, do in (("restore, warm", restore), ("compare, warm", compare)):
                found.setdefault(name, []).append(seconds(do))
            forget(step)
            found.setdefault("restore, cold", []).append(seconds(restore))
            forget(step)
            found.setdefault("compare and restore, cold", []).append(seconds(compare) + seconds(restore))
    medians = {name: round(statistics.median(values), 2) for name, values in found.items()}
    more = {
        "warm": medians["compare, warm"] / medians["restore, warm"],
        "cold": medians["compare and restore, cold"] / medians["restore, cold"] - 1,
    }
    written = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    more = {name: round(value, 3) for name, value in more.items()}
    return {"gigabytes": round(written / 2**30, 2), "seconds": medians, "more": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, metavar="N")
    parser.add_argument("--folder", metavar="SCRATCH", help="default: the system's for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = {"machine": machine(), **measured(Path(folder), options.gigabytes)}
    write_json(RESULTS / "verify.json", found)
    print(found)


if __name__ == "__main__":
    main()
