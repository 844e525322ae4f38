"""A run's checkpoints: parameters, training state and provenance in `checkpoints/STEP/`, written in the background.

`params` is an item of its own, so that whoever only wants the model need not know the optimizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
import operator
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import path as ocp_path

from steerjax.bundle.reader import CheckpointReader
from steerjax.checksums import write_list
from steerjax.errors import CheckpointError
from steerjax.files import cannot_write, sync

METRIC = "loss"
CHUNK_BYTES = 64 << 20


def _of_use(record: logging.LogRecord) -> bool:
    """Orbax warns of a save without metrics and of what a kill left, and logs the stack of what it raises as well."""
    said = record.getMessage()
    return not record.exc_info and "tracked_metric" not in said and "temporary directory" not in said


def _unraisable_of_use(unraisable) -> None:
    """Once a write has failed, Orbax closes the loop that tensorstore's other writes then report to."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


@epath.register_path_cls
class _Literal(type(epath.Path())):
    """A path whose own `[`, `*` and `?` are no pattern: Orbax looks for what the processes wrote with `glob`. It is
    local, too, though its first folder be `/gs` or `/s3`, which etils takes for a bucket's address."""

    _uri_scheme = None

    def glob(self, pattern: str) -> Iterator[_Literal]:
        return map(type(self), glob.glob(os.path.join(glob.escape(str(self)), pattern)))

    def rmtree(self, missing_ok: bool = False) -> None:
        """A step loses its name first, so that a kill leaves no half of it that looks damaged."""
        gone = self.rename(_temporary(self, "removed")) if self.name.isdecimal() else self
        super(_Literal, gone).rmtree(missing_ok)


def _temporary(step: epath.Path, purpose: str) -> epath.Path:
    """A name that Orbax knows for a temporary one: the next start removes it."""
    return step.with_name(f"{step.name}{ocp_path.atomicity.TMP_DIR_SUFFIX}-{purpose}")


class _Listed(ocp_path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's folder of a step until it is whole, which then gets a list of checksums before its name.

    Orbax calls it in the background, in process 0, when all processes have written. It does so for items as well.
    """

    async def finalize(self) -> None:
        final = self._final_path
        if not final.name.isdecimal():
            return await super().finalize()
        self._final_path = _temporary(final, "listed")
        await super().finalize()
        listed, self._final_path = Path(self._final_path), final
        await asyncio.to_thread(write_list, listed)
        await asyncio.to_thread(sync, listed)
        listed.rename(final)


class _Manager(ocp.CheckpointManager):
    """Knows at once what a save in the background failed of; Orbax itself waits for the other processes first, which
    may take its whole 20 minutes."""

    failure: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise


class CheckpointStore:
    """Saves and restores train states; keeps the newest `keep_last` and the best by validation loss.

    Every process calls every method; Orbax writes each shard once.
    """

    def __init__(self, directory: Path, keep_last: int):
        # Both stay: Orbax's threads outlive a store that failed.
        logging.getLogger("absl").addFilter(_of_use)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _unraisable_of_use
        loss = operator.itemgetter(METRIC)
        best = checkpoint_managers.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        policies = [checkpoint_managers.LatestN(keep_last), best]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=loss,  # without it Orbax writes no metrics, and the policy sees none
            best_mode="min",
            enable_async_checkpointing=True,
            # Made in the background, a folder that cannot be made is waited for, for 300 s.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            temporary_path_class=_Listed,
            cleanup_tmp_directories=True,
            num_deletion_threads=1,  # several take a step's files away before `_Literal.rmtree`
        )
        self.directory, self._saved = directory, None
        self._manager = _Manager(_Literal(directory.resolve()), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._manager.reload()

    def best_step(self) -> int | None:
        """Step of the kept checkpoint with the least validation loss."""
        return self._manager.best_step()

    def save(self, params, training, step: int, provenance: dict, validation_loss: float | None) -> None:
        """Starts writing two trees of arrays; returns when they have been copied and may be donated."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_chunks, params)),
            training=ocp.args.StandardSave(training),
            provenance=ocp.args.JsonSave(provenance),
        )
        metrics = None if validation_loss is None else {METRIC: validation_loss}
        self.wait()
        self._saved = step
        with self._writing():
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, step: int, params, training) -> tuple:
        """(params, training) of a step, read straight into the shardings of these abstract trees, whatever was saved.

        Raises CheckpointError: the checkpoint cannot be read as such a state.
        """
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params), training=ocp.args.StandardRestore(training))
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, OSError) as error:
            said, cure = f"{self._manager.directory}/{step} cannot be restored", "the config that the run began with"
            raise CheckpointError(f"{said}: {error}\n  cure: {cure}") from error
        return found["params"], found["training"]

    def check(self) -> None:
        """Raises WriteError: what is saved in the background cannot be written."""
        with self._writing():
            if self._manager.failure is not None:
                raise self._manager.failure

    def wait(self) -> None:
        """Blocks until everything is on disk.

        Raises WriteError: it cannot be written. CheckpointError: what was written cannot be opened.
        """
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.01)
        with self._writing():
            self._manager.wait_until_finished()
        if self._saved is not None and jax.process_index() == 0:
            CheckpointReader(Path(self._manager.directory) / str(self._saved))
        self._saved = None

    def _writing(self):
        return cannot_write(self._manager.directory, ValueError)  # tensorstore's, of a full disk

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, error, *_) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the others may be gone, and closing waits for them
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.wait()
            with self._writing():
                self._manager.close()


def _chunks(path, _) -> ocp.SaveArgs:
    """Each layer of a stack in chunks of its own, so that an export can read one without the others."""
    stacked = any(getattr(part, "key", None) == "layers" for part in path)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())
