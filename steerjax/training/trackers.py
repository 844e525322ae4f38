"""Where a run's figures are looked at while it goes. A new tracker is a class like these and a line in `TRACKERS`.

`metrics.jsonl` has every figure whatever the trackers do; a tracker that fails costs no run.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from steerjax.errors import SteerjaxError
from steerjax.files import write_text


class Tracker(Protocol):
    """One is made by process 0 for a run, and again by each resume."""

    @staticmethod
    def check() -> None:
        """Refuses at the start of a run what the end of it would show. Raises SteerjaxError: names the cure."""

    def __init__(self, workdir: Path, step: int, config: Mapping):
        """`step`: of the checkpoint that the run goes on from, or 0; `config`: the resolved experiment."""

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Figures of `train` or `validation` by name, all finite; `step` counts finished updates."""

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        """The report's pictures (PNG) by name."""

    def close(self, *, failed: bool) -> None:
        """`failed`: the run ends before its last step."""


class TensorBoard:
    """Event files in `WORKDIR/tensorboard`: `tensorboard --logdir WORKDIR`."""

    @staticmethod
    def check() -> None:
        pass

    def __init__(self, workdir: Path, step: int, config: Mapping):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        # Its SummaryWriter writes in a thread that dies of a full disk, and then waits for it for ever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._summary, self._event = summary, event_pb2.Event
        self._file = event_file_writer.EventsWriter(str(workdir / "tensorboard" / "events"))
        # What an interrupted start has of later steps is hidden.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(step=step + 1, wall_time=time.time(), session_log=start))
        indented = json.dumps(config, indent=2).replace("\n", "\n    ")
        self._write(step, [summary.text("config", f"    {indented}")])  # four spaces: code, in Markdown

    def _write(self, step: int, summaries: Iterable) -> None:
        for each in summaries:
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=each))
        self._file.flush()

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._write(step, [self._summary.scalar(f"{split}/{name}", value) for name, value in values.items()])

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        from matplotlib.image import imread

        read = {name: imread(path) for name, path in pictures.items()}
        self._write(step, [self._summary.image(name, array, dataformats="HWC") for name, array in read.items()])

    def close(self, *, failed: bool) -> None:
        self._file.close()


class WandB:
    """A run of Weights & Biases. What it reads besides is its own: WANDB_PROJECT (without it: steerjax), WANDB_ENTITY,
    WANDB_NAME (without it: the workdir's), WANDB_MODE=offline, and all else that its documentation names."""

    @staticmethod
    def check() -> None:
        try:
            import wandb
        except ImportError as error:
            cure = "pip install 'steerjax[wandb]', or config.train.trackers without it"
            raise SteerjaxError(f"config.train.trackers: 'wandb' is not installed ({error})\n  cure: {cure}") from error
        if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
            try:
                wandb.login(verify=False)  # on a terminal it asks for a key; a server that is down refuses no run
            except wandb.Error as error:
                cure = "wandb login; or WANDB_MODE=offline, and `wandb sync` later"
                raise SteerjaxError(f"config.train.trackers: wandb: {error}\n  cure: {cure}") from error

    def __init__(self, workdir: Path, step: int, config: Mapping):
        import wandb

        path = workdir / "wandb_id"  # a resume goes on with the same run
        name = path.read_text().strip() if step and path.exists() else ""
        name = name or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        write_text(path, name + "\n")
        options = {
            "dir": workdir, "id": name, "resume": "allow", "config": {}, "reinit": "create_new",
            "project": os.environ.get("WANDB_PROJECT") or "steerjax",
            "name": os.environ.get("WANDB_NAME") or workdir.name,
        }  # fmt: skip
        try:
            self._run = wandb.init(**options)
        except wandb.errors.CommError as error:
            said = str(error).splitlines()[0]
            _say(f"wandb does not reach its server ({said}); the run is kept in {workdir / 'wandb'}: wandb sync")
            wandb.teardown()  # else its service holds the run's id
            self._run = wandb.init(**options, mode="offline")
        self._run.config.update(config, allow_val_change=True)
        # An axis of our own: W&B's may not go back, and a resume does some steps again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {f"{split}/{name}": value for name, value in values.items()})

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        import wandb

        self._run.log({"step": step} | {name: wandb.Image(str(path)) for name, path in pictures.items()})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """Those that the config names. One that fails is named and left out from there on, and the run goes on."""

    def __init__(self, names: Sequence[str], workdir: Path, step: int, config: Mapping):
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._open.update({name: TRACKERS[name](workdir, step, config)}))

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, split, values))

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        self._each(lambda tracker: tracker.show(step, pictures))

    def close(self, *, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed=failed))

    def _each(self, call) -> None:
        for name, tracker in tuple(self._open.items()):
            self._try(name, lambda tracker=tracker: call(tracker))

    def _try(self, name: str, call) -> None:
        try:
            call()
        except Exception as error:  # whatever a foreign library raises
            self._open.pop(name, None)
            _say(f"the tracker {name} failed, and the run goes on without it: {type(error).__name__}: {error}")


def _say(words: str) -> None:
    tqdm.write(words)
