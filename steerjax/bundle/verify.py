"""Whether a stored model is what was written: checkpoints and exports have a list of checksums."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steerjax.bundle.reader import is_checkpoint
from steerjax.checksums import LIST, what_is_wrong
from steerjax.errors import CheckpointError, ModelError

ABOUT = "steerjax.json"
MODEL = "params/"  # what most commands read of a checkpoint; the training state is several times as large


def is_step(directory: Path) -> bool:
    """Whether it stands where a run has a checkpoint, whole or not."""
    return directory.name.isdecimal() and directory.is_dir()


def steps_of(checkpoints: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the newest first. (Orbax writes under another name.)"""
    found = [step for step in checkpoints.iterdir() if is_step(step)] if checkpoints.is_dir() else []
    return sorted(found, key=lambda step: int(step.name), reverse=True)


def damage(step: Path, *, read: str | tuple[()] = MODEL, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint, "" where nothing is known to be; arguments as `what_is_wrong`.

    One that has no list, of an older steerjax, must have what each has.
    """
    if (step / LIST).exists():
        return what_is_wrong(step, read=read, share=share)
    said = {}
    metrics = ["metrics/metrics"] if (step / "metrics").exists() else []
    for name in ("params/_METADATA", "provenance/metadata", *metrics):
        try:
            said[name] = json.loads((step / name).read_bytes())
            said[name].keys()
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            return f"{name} cannot be read ({error})"
    return f"{LIST} is missing" if said["provenance/metadata"].get("checksums") else ""


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def checked_step(step: Path, verify: bool) -> Path:
    """A checkpoint that was asked for itself; without `verify` nothing of it is compared with its checksums.

    Raises CheckpointError: it is damaged; names one that is not.
    """
    if problem := _problem(step, verify):
        whole = next((other for other in steps_of(step.parent) if other != step and not damage(other)), None)
        cure = f"'{whole}', the newest that is whole" if whole else "none of the run is whole; copy it again, or train"
        raise CheckpointError(f"'{step}' is damaged: {problem}\n  cure: {cure}")
    return step


def newest_sound(checkpoints: Path, verify: bool) -> Path | None:
    """A run's newest checkpoint that is whole; says so of each that is passed over. None where it has none at all.

    Raises CheckpointError: all are damaged.
    """
    steps, first = steps_of(checkpoints), ""
    for step in steps:
        if not (problem := _problem(step, verify)):
            return step
        first = first or f"'{step}' is damaged: {problem}"
        say(f"'{step}' is damaged and passed over: {problem}")
    if steps:
        raise CheckpointError(f"no checkpoint of the run is whole. {first}\n  cure: copy it again, or train again")
    return None


def checked_folder(folder: Path, verify: bool) -> Path:
    """A Hugging Face folder. Raises ModelError: it differs from its list, which only an export has."""
    if not verify:
        return folder
    problem = ""
    if (folder / LIST).exists():
        problem = what_is_wrong(folder, foreign=False)
    elif _says_listed(folder):
        problem = f"{LIST} is missing"
    if problem:
        cure = "export it again, or --no-verify if the change is yours"
        raise ModelError(f"'{folder}' is not what was exported: {problem}\n  cure: {cure}")
    return folder


def _problem(step: Path, verify: bool) -> str:
    if not verify:
        return "" if is_checkpoint(step) else "params or provenance is missing"
    problem = damage(step)
    if not problem and not (step / LIST).exists():
        say(f"'{step}' has no checksums, as an older steerjax wrote it: it cannot be verified")
    return problem


def _says_listed(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / ABOUT).read_bytes()).get("checksums"))
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
