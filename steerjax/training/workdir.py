"""The run's folder: whose it is, and what its checkpoints say about themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from steerjax import __version__
from steerjax.bundle.describe import output_names
from steerjax.bundle.provenance import Provenance, TokenizerSource, read_provenance
from steerjax.chat.render import Renderer
from steerjax.chat.tokenizer import Tokenizer, copy_tokenizer
from steerjax.data.loading import file_hashes
from steerjax.errors import CheckpointError
from steerjax.hf.description import Description
from steerjax.objectives import Objective
from steerjax.schema import Schema
from steerjax.training.config import Experiment

# What a second start may change: the machine, how long and how loudly it trains. All else would not be a resume.
RESUME_MAY_CHANGE = ("mesh", "compute", "train")


def claim_workdir(workdir: Path, experiment: Experiment) -> None:
    """Writes config.json, after a check that the workdir's run is the same experiment.

    Raises:
        CheckpointError: names the first key that differs.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(json.loads(path.read_text()), json.loads(experiment.to_json()), workdir)
        path.write_text(experiment.to_json())
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

    if "task" in old:
        raise CheckpointError(
            f"'{workdir}' is a run of edition 1 of steerjax, which this does not read; cure: another --workdir"
        )
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
    experiment: Experiment,
    schema: Schema,
    renderer: Renderer,
    objectives: Sequence[Objective],
    source: Description | None,
) -> Provenance:
    """What the run's checkpoints say (design, decision 13)."""
    e = experiment
    facts = {key: value for objective in objectives for key, value in objective.facts().items()}
    if "rated_attributes" in facts:
        rated = set(facts["rated_attributes"])
        if source and output_names(source) == schema.names:  # its head goes on, and what that had learned counts
            rated |= set(source.provenance.get("rated_attributes") or schema.names)
        facts["rated_attributes"] = tuple(name for name in schema.names if name in rated)
    return Provenance(
        steerjax=__version__,
        kind=objectives[0].kind,
        objectives=e.objectives,
        attributes=schema.attributes,
        model=e.model.architecture(),
        template=e.chat.template,
        system_prompt=renderer.system_prompt,
        readout=e.head.readout,
        tokenizer=TokenizerSource(e.chat.tokenizer, renderer.tokenizer.hash),
        base_model=e.model.source,
        data=file_hashes((*e.data.train, *e.data.validation)),
        config=e.to_dict(),
        **facts,
    )


def check_same_inputs(checkpoint: Path, now: Provenance, accept: bool) -> Provenance:
    """The provenance of what a resumed run saves: `now`, with the changes that were accepted.

    Raises:
        CheckpointError: data or tokenizer are not those of the checkpoint, and the user has not accepted that.
    """
    before = read_provenance(checkpoint)
    changed = [source for source in now.data if before.data.get(source) != now.data[source]]
    if before.tokenizer.sha256 != now.tokenizer.sha256:
        changed.append(f"tokenizer {now.tokenizer.source}")
    if changed and not accept:
        raise CheckpointError(
            f"{checkpoint} was trained on other content of {', '.join(changed)}\n"
            "  cure: put the old files back, use another --workdir, or accept it (it is recorded) with "
            "--config.train.accept_changes=True"
        )
    accepted = before.accepted + tuple(f"before step {checkpoint.name} done: {name}" for name in changed)
    return dataclasses.replace(now, accepted=accepted)


def keep_tokenizer(tokenizer: Tokenizer, workdir: Path) -> None:
    """Puts the tokenizer's files beside the checkpoints, so that a run can be moved and opened anywhere."""
    folder = workdir / "tokenizer"
    if not folder.exists():
        folder.mkdir()
        copy_tokenizer(tokenizer, folder)
