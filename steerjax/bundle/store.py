"""A run's checkpoints: parameters, training state and provenance in `checkpoints/STEP/`, written in the background.

`params` is an item of its own, so that whoever only wants the model need not know the optimizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import operator
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import path as ocp_path

from steerjax.checksums import write_list
from steerjax.errors import CheckpointError

METRIC = "loss"
CHUNK_BYTES = 64 << 20


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Orbax warns of a save without metrics; a run that was stopped saves so, and says it itself."""
    log, quiet = logging.getLogger("absl"), lambda record: "tracked_metric" not in record.getMessage()
    log.addFilter(quiet)
    try:
        yield
    finally:
        log.removeFilter(quiet)


class _Listed(ocp_path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's folder of a step until it is whole, which then gets a list of checksums before its name.

    Orbax calls it in the background, in process 0, when all processes have written. It does so for items as well.
    """

    async def finalize(self) -> None:
        final = self._final_path
        if not final.name.isdecimal():
            return await super().finalize()
        self._final_path = final.parent / f"{self.get().name}-listed"  # Orbax knows it for a temporary one
        await super().finalize()
        listed, self._final_path = Path(self._final_path), final
        await asyncio.to_thread(write_list, listed)
        listed.rename(final)


class CheckpointStore:
    """Saves and restores train states; keeps the newest `keep_last` and the best by validation loss.

    Every process calls every method; Orbax writes each shard once.
    """

    def __init__(self, directory: Path, keep_last: int):
        loss = operator.itemgetter(METRIC)
        best = checkpoint_managers.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        policies = [checkpoint_managers.LatestN(keep_last), best]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=loss,  # without it Orbax writes no metrics, and the policy sees none
            best_mode="min",
            enable_async_checkpointing=True,
            temporary_path_class=_Listed,
        )
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

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
        with _unwarned():
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

    def wait(self) -> None:
        """Blocks until everything is on disk. Raises CheckpointError: it cannot be written."""
        try:
            self._manager.wait_until_finished()
        except (ValueError, OSError) as error:  # tensorstore's, of a full disk
            cure = "free some space; the same command goes on from the last whole checkpoint"
            raise CheckpointError(f"{self._manager.directory} cannot be written: {error}\n  cure: {cure}") from error

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, error, *_) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the others may be gone, and closing waits for them
        self._manager.wait_until_finished()
        self._manager.close()


def _chunks(path, _) -> ocp.SaveArgs:
    """Each layer of a stack in chunks of its own, so that an export can read one without the others."""
    stacked = any(getattr(part, "key", None) == "layers" for part in path)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())
