"""The run's folder: whose it is, and what its checkpoints say about themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from steerjax import __version__
from steerjax.chat.tokenizer import Tokenizer
from steerjax.config import Experiment, to_dict, to_json
from steerjax.data.loading import file_hashes
from steerjax.errors import CheckpointError
from steerjax.schema import Schema

# What a second start may change: the machine, how long and how loudly it trains. All else would not be a resume.
RESUME_MAY_CHANGE = ("mesh", "compute", "train")


def claim_workdir(workdir: Path, experiment: Experiment, *, write: bool) -> None:
    """Writes config.json, or checks that the workdir's run is the same experiment.

    Raises:
        CheckpointError: names the first key that differs.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(json.loads(path.read_text()), json.loads(to_json(experiment)), workdir)
        if write:
            path.write_text(to_json(experiment))
    except OSError as error:
        raise CheckpointError(f"--workdir {workdir}: {error.strerror}; cure: a folder that can be written") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is broken: {error}; cure: another --workdir") from error


def _check_same(old: dict, new: dict, workdir: Path) -> None:
    def differences(old, new, path):
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                yield from differences(old.get(key), new.get(key), f"{path}.{key}")
        elif old != new:
            yield path, old, new

    for group in old.keys() | new.keys():
        if group in RESUME_MAY_CHANGE:
            continue
        for path, before, now in differences(old.get(group), new.get(group), f"config.{group}"):
            raise CheckpointError(
                f"{workdir} holds a run with {path} {before!r}, and now it is {now!r}; "
                "cure: the old value to resume, or another --workdir"
            )
    if old["train"]["seed"] != new["train"]["seed"]:
        raise CheckpointError(f"{workdir} holds a run with another config.train.seed; cure: another --workdir")


def make_provenance(
    experiment: Experiment, schema: Schema, tokenizer: Tokenizer, kind: str, default_ratings: Mapping | None
) -> dict:
    """What a checkpoint says about itself (design, decision 13)."""
    data = experiment.data
    return {
        "steerjax": __version__,
        "kind": kind,
        "attributes": schema.to_json(),
        "default_ratings": default_ratings,
        "template": experiment.chat.template,
        "tokenizer": {"source": experiment.chat.tokenizer, "sha256": tokenizer.hash},
        "base_model": experiment.model.source,
        "data": file_hashes((*data.train, *data.validation)),
        "config": to_dict(experiment),
    }


def copy_tokenizer(tokenizer: Tokenizer, workdir: Path) -> None:
    """Puts the tokenizer's files beside the checkpoints, so that a run can be moved and opened anywhere."""
    folder = workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    for file in tokenizer.files:
        shutil.copyfile(file, folder / file.name)
