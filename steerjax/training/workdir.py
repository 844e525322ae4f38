"""The run's folder: whose it is, and what its checkpoints say about themselves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steerjax import __version__
from steerjax.bundle.describe import Provenance, TokenizerSource, output_names, read_provenance
from steerjax.bundle.verify import steps_of
from steerjax.chat.render import Renderer
from steerjax.chat.templates import named
from steerjax.chat.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from steerjax.checksums import folder_checksum, what_is_wrong, write_list
from steerjax.data.loading import file_hashes
from steerjax.errors import CheckpointError, ModelError
from steerjax.files import make_folder, whole_folder, write_text
from steerjax.hf.description import Description
from steerjax.locks import only_writer
from steerjax.objectives import Objective
from steerjax.schema import Schema
from steerjax.training.config import Experiment
from steerjax.typed import read_json

# What a second start may change: the machine and what fits its memory, how long and how loudly it trains. All else
# would not be a resume.
_MAY_CHANGE = ("mesh.", "compute.", "train.", "batch.micro_batches", "batch.evaluation_rows")

# What a run writes into its folder.
_FOLDERS = ("checkpoints", "tokenizer", "report", "compile_cache", "tensorboard", "wandb")
_FILES = ("config.json", "metrics.jsonl", "skipped.jsonl", "wandb_id", ".lock")
_ELSEWHERE = "move it away, or another --workdir"


def claim_workdir(workdir: Path, experiment: Experiment) -> None:
    """Writes config.json, after a check that the workdir's run is the same experiment.

    Raises:
        CheckpointError: names the first key that differs, or a file where the run will have a folder.
    """
    path = workdir / "config.json"
    make_folder(workdir)
    _check_names(workdir)
    if path.exists():
        cure = f"delete it, if the recipe is still the same, or another --workdir (not {workdir})"
        _check_same(read_json(dict[str, Any], path, CheckpointError, cure), experiment, workdir)
    for newest in steps_of(workdir / "checkpoints")[:1]:  # config.json may be gone, or edited as the recipe was
        before = None
        with contextlib.suppress(CheckpointError):  # a damaged one: see resume.py
            before = read_provenance(newest).config
        if before:
            _check_same(before, experiment, workdir)
    write_text(path, experiment.to_json())


def _check_names(workdir: Path) -> None:
    """Refuses at the start what would end the run at its first checkpoint, or at its report."""
    for name in _FOLDERS:
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise CheckpointError(f"{workdir / name} is a file, and the run has a folder there; cure: {_ELSEWHERE}")
    for name in _FILES:
        if (workdir / name).is_dir():
            raise CheckpointError(f"{workdir / name} is a folder, and the run has a file there; cure: {_ELSEWHERE}")


def only_run(workdir: Path, *, active: bool) -> contextlib.AbstractContextManager[None]:
    """While it lasts no other process trains in the folder; only process 0 of a run, the `active` one, asks.

    Raises LockedError: one does, e.g. a run that was stopped and is still saving.
    """
    return only_writer(workdir, workdir / ".lock") if active else contextlib.nullcontext()


def _check_same(old: dict, experiment: Experiment, workdir: Path) -> None:
    new = json.loads(experiment.to_json())
    if "task" in old:
        raise CheckpointError(f"'{workdir}' is a run of edition 1 of steerjax; cure: another --workdir")
    before, now = fixed(old), fixed(new)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise CheckpointError(
                f"{workdir} holds a run with config.{key} {before.get(key)!r}, and now it is {now.get(key)!r}; "
                "cure: the old value to resume, or another --workdir"
            )


def fixed(config: dict) -> dict[str, object]:
    """`group.key` -> value of what no second start may change, of an experiment's dict."""
    return {k: v for k, v in _leaves(config) if k == "train.seed" or not k.startswith(_MAY_CHANGE)}


def _leaves(config: dict, path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def make_provenance(
    experiment: Experiment,
    schema: Schema,
    renderer: Renderer,
    objectives: Sequence[Objective],
    source: Description | None,
) -> Provenance:
    """What the run's checkpoints say (design, decision 13)."""
    e, said = experiment, [o.facts() for o in objectives]
    facts = {key: value for each in said for key, value in each.items()}
    if "rated_attributes" in facts:
        rated = {name for each in said for name in each.get("rated_attributes", ())}
        if source and output_names(source) == schema.names:  # its head goes on, and what that had learned counts
            rated |= set(source.provenance.get("rated_attributes") or schema.names)
        facts["rated_attributes"] = tuple(name for name in schema.names if name in rated)
    return Provenance(
        steerjax=__version__,
        kind=objectives[0].kind,
        objectives=e.objectives,
        attributes=schema.attributes,
        model=e.model.architecture(),
        template=named(renderer.template),
        system_prompt=renderer.system_prompt,
        readout=e.head.readout,
        tokenizer=TokenizerSource(e.chat.tokenizer, renderer.tokenizer.hash),
        base_model=e.model.source,
        data=file_hashes(e.sources()),
        config=e.to_dict(),
        source_checksum=folder_checksum(source.path) if source and e.train.verify else "",
        checksums=True,
        **facts,
    )


def keep_tokenizer(tokenizer: Tokenizer, workdir: Path) -> None:
    """Puts the tokenizer's files beside the checkpoints, so that a run can be moved and opened anywhere.

    A copy that is not this tokenizer's, or not whole, as a full disk leaves one, is replaced.
    """
    folder = workdir / "tokenizer"
    with contextlib.suppress(ModelError):
        if load_tokenizer(folder).hash == tokenizer.hash and not what_is_wrong(folder):
            return
    with whole_folder(folder) as new:
        copy_tokenizer(tokenizer, new)
        write_list(new)
