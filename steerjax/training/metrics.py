"""What a run says while it goes: metrics.jsonl, its trackers, and a line or a bar on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from steerjax.checksums import with_own
from steerjax.files import cannot_write, copy_file, write_text
from steerjax.report.records import read_metrics
from steerjax.training.trackers import Trackers


class MetricsWriter:
    """Writes records of one step; only process 0 has one that writes.

    `metrics.jsonl` has a JSON object a line with `step` and `split`, and the line's checksum; a value that is not
    finite is null.

    Attributes:
        evaluated: the step that the run goes on from has a record of its evaluation, as the one that writes sees it.
    """

    def __init__(self, workdir: Path, resume_step: int, trackers: Sequence[str], config: Mapping, *, active: bool):
        self._active, self._path, self.evaluated = active, workdir / "metrics.jsonl", False
        if not active:  # nor does it read what the other may be writing anew
            return
        found = read_metrics(self._path)
        kept = [record for record in found if record["step"] <= resume_step]
        self.evaluated = any(r["step"] == resume_step and r["split"] == "validation" for r in kept)
        if resume_step == 0 and self._path.exists():  # of a run that left no checkpoint
            self._path.rename(self._aside())
            kept = []
        elif self._path.exists() and len(found) < self._path.read_bytes().count(b"\n"):  # damaged
            copy_file(self._path, self._aside())
        # The steps after the checkpoint are done again; their first records go, so that none stands twice.
        write_text(self._path, "".join(map(_line, kept)))
        with cannot_write(self._path):
            self._file = self._path.open("a", buffering=1)
        self._trackers = Trackers(trackers, workdir, resume_step, config)

    def _aside(self) -> Path:
        return self._path.with_name(f"metrics.{time.time_ns()}.jsonl")

    def write(self, step: int, split: str, values: Mapping[str, float | int | None]) -> None:
        """Adds a record. `step` counts finished updates."""
        if not self._active:
            return
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with cannot_write(self._path):
            self._file.write(_line({"step": step, "split": split, **clean}))
        self._trackers.log(step, split, {name: value for name, value in clean.items() if value is not None})

    def show(self, step: int, report: Path) -> None:
        """Gives the pictures in the report's folder to the trackers."""
        if self._active:
            found = sorted(report.rglob("*.png"))
            names = [path.relative_to(report.parent).with_suffix("").as_posix() for path in found]
            self._trackers.show(step, dict(zip(names, found, strict=True)))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, error, *_) -> None:
        if self._active:
            self._trackers.close(failed=error is not None)
            # What could not be written is tried again here.
            with contextlib.suppress(OSError) if error is not None else cannot_write(self._path):
                self._file.close()


class Progress:
    """A bar on a terminal; elsewhere a line now and then, with the time that is left; silent but on process 0."""

    def __init__(self, first: int, steps: int, *, active: bool, what: str = "step"):
        self._active, self._what, self._first, self._begun = active, what, first + 1, None  # the first step compiles
        self._every = max(1, steps // 20)
        off = None if active else True
        self._bar = tqdm(total=steps, initial=first, desc=what, unit="step", dynamic_ncols=True, disable=off)

    def step(self, step: int, words: str = "") -> None:
        """Says that a step is done."""
        self._begun = self._begun or time.monotonic()
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(words)
        elif step % self._every == 0 or step == self._bar.total:
            said = [f"{self._what} {step}/{self._bar.total}", *([words] if words else [])]
            if self._first < step < self._bar.total:
                each = (time.monotonic() - self._begun) / (step - self._first)
                said.append(f"{duration(each * (self._bar.total - step))} left")
            self.say(f"{said[0]}: {', '.join(said[1:])}" if said[1:] else said[0])

    def say(self, words: str) -> None:
        """Prints a line without breaking the bar."""
        if self._active:
            tqdm.write(words)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


def _line(record: Mapping) -> str:
    return json.dumps(with_own(record)) + "\n"


def duration(seconds: float) -> str:
    """In words of two digits or so: 8 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say_phase(words: str, *, active: bool) -> None:
    """What a run does before its first step, as it begins."""
    if active:
        print(f"{words} ...", flush=True)
