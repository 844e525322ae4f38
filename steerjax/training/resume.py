"""Where a run goes on: its newest checkpoint that is whole."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steerjax.bundle.describe import Provenance, read_provenance
from steerjax.bundle.store import CheckpointStore
from steerjax.bundle.verify import damage, say, steps_of
from steerjax.checksums import LIST
from steerjax.errors import CheckpointError
from steerjax.files import cannot_write
from steerjax.parallel.processes import Processes
from steerjax.training.config import TrainConfig
from steerjax.training.program import Program


def restore_newest(
    store: CheckpointStore, program: Program, now: Provenance, config: TrainConfig, steps: int, processes: Processes
) -> tuple[int, Provenance, Any, Any]:
    """Step, provenance, parameters and training state of the newest whole checkpoint; 0, `now`, None, None without one.

    The provenance is `now`, the run's own, with the changes that were accepted; `steps` is the length of the run.

    One process compares a checkpoint after it has restored it: its files are in the page cache then, so that the disk
    is read once. Several have compared before, as one that cannot restore what is damaged leaves the others waiting.

    Raises CheckpointError: more steps are done; data, tokenizer or source differ; all checkpoints are damaged.
    """
    checkpoints = store.directory
    while True:
        step = store.latest_step()
        processes.agree("start from a checkpoint", {f"newest step in {checkpoints}": step})
        if step is None:
            return 0, now, None, None
        if step > steps:
            cure = f"config.train.steps (or epochs) of at least {step}, or another --workdir"
            raise CheckpointError(f"{checkpoints} has step {step}, and {steps} are asked for; cure: {cure}")
        provenance = check_same_inputs(checkpoints / str(step), now, config.accept_changes)
        found = failure = None
        try:
            found = store.restore(step, program.whole, program.abstract.rest())
        except Exception as error:  # whatever damage leads to
            failure = error
        alone = config.verify and processes.count == 1
        if alone and set_damaged_aside(checkpoints, processes, program.any_process, whole=True):
            store.reload()
            continue
        if failure:
            raise failure
        return step, provenance, *found


def set_damaged_aside(
    checkpoints: Path, processes: Processes, any_process: Callable[[bool], Any], *, whole: bool
) -> bool:
    """Renames checkpoints that are damaged to STEP.damaged, so that the run goes on from the newest that is not.

    That one is read `whole`, each process its share, and the others as far as the run opens them.
    Returns whether there were any. Raises CheckpointError: all are damaged.
    """
    sound, damaged, share = None, [], (processes.index, processes.count)
    for step in steps_of(checkpoints):
        problem = damage(step, read="" if whole and sound is None else (), share=share)
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
        if sound and whole and not (sound / LIST).exists():
            say(f"'{sound}' has no checksums, as an older steerjax wrote it: it cannot be verified")
    processes.barrier("damaged checkpoints are set aside")
    return bool(damaged)


def _names_aside(step: Path) -> Iterator[Path]:
    yield step.with_name(f"{step.name}.damaged")
    for number in itertools.count(2):
        yield step.with_name(f"{step.name}.damaged-{number}")


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
