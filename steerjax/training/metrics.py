"""What a run says while it goes: metrics.jsonl, TensorBoard, and a line or a bar on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from steerjax.report.records import read_metrics


class MetricsWriter:
    """Writes records of one step; only process 0 has one that writes.

    `metrics.jsonl` has a JSON object a line with `step` and `split`; a value that is not finite is null.

    Attributes:
        evaluated: the step that the run goes on from has a record of its evaluation.
    """

    def __init__(self, workdir: Path, resume_step: int, *, active: bool):
        self._active, self._path = active, workdir / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= resume_step]
        self.evaluated = any(r["step"] == resume_step and r["split"] == "validation" for r in kept)
        if not active:
            return
        from tensorboardX import SummaryWriter

        if resume_step == 0 and self._path.exists():  # of a run that left no checkpoint
            self._path.rename(self._path.with_name(f"metrics.{time.time_ns()}.jsonl"))
            kept = []
        # The steps after the checkpoint are done again; their first records go, so that none stands twice.
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self._path)
        self._file = self._path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float | int | None]) -> None:
        """Adds a record. `step` counts finished updates."""
        if not self._active:
            return
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
        for name, value in clean.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()


class Progress:
    """A bar on a terminal, a line now and then elsewhere; silent but on process 0."""

    def __init__(self, first: int, steps: int, *, active: bool):
        self._active, self._every = active, max(1, steps // 20)
        self._bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=None if active else True)

    def step(self, step: int, loss: float, examples_per_second: float) -> None:
        """Says that a step is done."""
        words = f"loss {loss:.4f}, {examples_per_second:.1f} examples/s"
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(words)
        elif step % self._every == 0 or step == self._bar.total:
            self.say(f"step {step}/{self._bar.total}: {words}")

    def say(self, words: str) -> None:
        """Prints a line without breaking the bar."""
        if self._active:
            tqdm.write(words)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
