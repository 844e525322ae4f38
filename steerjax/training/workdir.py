"""The run's folder: whose it is, and what its checkpoints say about themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from steerjax import __version__
from steerjax.bundle.describe import Provenance, TokenizerSource, output_names, read_provenance
from steerjax.bundle.verify import say, steps_of
from steerjax.chat.render import Renderer
from steerjax.chat.templates import named
from steerjax.chat.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from steerjax.checksums import LIST, folder_checksum, what_is_wrong, write_list
from steerjax.data.loading import file_hashes
from steerjax.errors import CheckpointError, ModelError
from steerjax.files import cannot_write, make_folder, whole_folder, write_text
from steerjax.hf.description import Description
from steerjax.locks import only_writer
from steerjax.objectives import Objective
from steerjax.parallel.processes import Processes
from steerjax.schema import Schema
from steerjax.training.config import Experiment
from steerjax.typed import read_json

# What a second start may change: the machine, how long and how loudly it trains. All else would not be a resume.
RESUME_MAY_CHANGE = ("mesh.", "compute.", "train.")

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
        with contextlib.suppress(CheckpointError):  # a damaged one: see `set_damaged_aside`
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


def set_damaged_aside(
    checkpoints: Path,
    processes: Processes,
    any_process: Callable[[bool], bool],
    damage: Callable[..., str],
    *,
    verify: bool,
    beside: bool = False,
) -> None:
    """Renames checkpoints that are damaged to STEP.damaged, so that the run goes on from the newest that is not.

    `damage` says of one what this process finds in its share (`newest_compared`). That newest one is read whole, unless
    that is done `beside` restoring it, and the others as far as the run opens them.
    Raises CheckpointError: all are damaged.
    """
    sound, damaged = None, []
    for step in steps_of(checkpoints):
        problem = damage(step, whole=verify and not beside and sound is None)
        if problem:
            say(f"'{step}' is damaged: {problem}")
        if any_process(bool(problem)):
            damaged.append(step)
        else:
            sound = sound or step
    if damaged and sound is None:
        cure = f"copy it again, or delete '{checkpoints}' to begin anew"
        raise CheckpointError(f"'{damaged[0]}' is damaged, and no other checkpoint of the run is whole\n  cure: {cure}")
    if processes.index == 0:
        for step in damaged:
            aside = next(name for name in _names_aside(step) if not name.exists())
            with cannot_write(aside):
                step.rename(aside)
            say(f"'{step}' is '{aside.name}' now; the run goes on from {sound.name}")
        if sound and verify and not (sound / LIST).exists():
            say(f"'{sound}' has no checksums, as an older steerjax wrote it: it cannot be verified")
    processes.barrier("damaged checkpoints are set aside")


def _names_aside(step: Path) -> Iterator[Path]:
    yield step.with_name(f"{step.name}.damaged")
    for number in itertools.count(2):
        yield step.with_name(f"{step.name}.damaged-{number}")


def _check_same(old: dict, experiment: Experiment, workdir: Path) -> None:
    new = json.loads(experiment.to_json())
    if "task" in old:
        raise CheckpointError(f"'{workdir}' is a run of edition 1 of steerjax; cure: another --workdir")
    before, now = dict(leaves(old)), dict(leaves(new))
    for key in sorted(before.keys() | now.keys()):
        free = key.startswith(RESUME_MAY_CHANGE) and key != "train.seed"
        if before.get(key) != now.get(key) and not free:
            raise CheckpointError(
                f"{workdir} holds a run with config.{key} {before.get(key)!r}, and now it is {now.get(key)!r}; "
                "cure: the old value to resume, or another --workdir"
            )


def leaves(config: dict, path: str = "") -> Iterator[tuple[str, object]]:
    """(`group.key`, value) of an experiment's dict."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
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


def check_same_inputs(checkpoint: Path, now: Provenance, accept: bool) -> Provenance:
    """`now` with the changes of data, tokenizer and source since the checkpoint that were accepted.

    Raises:
        CheckpointError: there are some, and the user has not accepted them.
    """
    before = read_provenance(checkpoint)
    changed = [source for source in now.data if before.data.get(source) != now.data[source]]
    if before.tokenizer.sha256 != now.tokenizer.sha256:
        changed.append(f"tokenizer {now.tokenizer.source}")
    if before.template != now.template:
        changed.append("the source's chat template")
    if before.source_checksum and now.source_checksum not in ("", before.source_checksum):
        changed.append(f"the source model {now.base_model}")
    if changed and not accept:
        raise CheckpointError(
            f"{checkpoint} was trained on other content of {', '.join(changed)}\n"
            "  cure: put the old files back, use another --workdir, or accept it (it is recorded) with "
            "--config.train.accept_changes=True"
        )
    accepted = before.accepted + tuple(f"after step {checkpoint.name}: {name}" for name in changed)
    return dataclasses.replace(now, accepted=accepted)


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
