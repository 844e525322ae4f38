"""Does a step fit, and if not, which change makes it fit: tried one after the other, each by compiling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from steerjax.planning.compile import Compiled
from steerjax.training.config import Experiment

# Part of a device's memory that a plan leaves free: the next batch, the evaluation's program, fragments.
RESERVE = 0.05
REMAT = ("none", "dots", "full")


@dataclass(frozen=True)
class Attempt:
    """A compiled variant of an experiment.

    Attributes:
        flags: what it changes, as flags of the command; () for the experiment itself.
        good: it fits.
    """

    flags: tuple[str, ...]
    experiment: Experiment
    compiled: Compiled
    good: bool


def fits(compiled: Compiled, hbm_bytes: float) -> bool:
    """Within a device's memory less the reserve."""
    return compiled.memory is not None and compiled.used <= (1 - RESERVE) * hbm_bytes


def find_cure(
    experiment: Experiment, compile: Callable[[Experiment], Compiled], hbm_bytes: float, *, search: bool = True
) -> Iterator[Attempt]:
    """Compiles the experiment, and while it does not fit and `search` is set, variants, each going on from the last.

    Args:
        experiment: with all axes of its mesh given.

    Yields:
        All that is tried, in order; the last is the cure if it fits.
    """
    for flags, variant in itertools.chain([((), experiment)], _variants(experiment) if search else ()):
        compiled = compile(variant)
        yield (attempt := Attempt(flags, variant, compiled, fits(compiled, hbm_bytes)))
        if attempt.good:
            return


def _variants(e: Experiment) -> Iterator[tuple[tuple[str, ...], Experiment]]:
    """The cheapest change first: state over more devices, then recomputation, then smaller parts of the batch."""
    flags: dict[str, object] = {}

    def changed(group: str, **values) -> tuple[tuple[str, ...], Experiment]:
        nonlocal e
        e = replace(e, **{group: replace(getattr(e, group), **values)})
        flags.update({f"--config.{group}.{key}": value for key, value in values.items()})
        return tuple(f"{key}={value}" for key, value in flags.items()), e

    if e.mesh.data > 1:
        yield changed("mesh", data=1, fsdp=e.mesh.data * e.mesh.fsdp)
    for policy in REMAT[REMAT.index(e.compute.remat) + 1 :]:
        yield changed("compute", remat=policy)
    ways = e.mesh.data * e.mesh.fsdp
    while e.batch.rows % (2 * e.batch.micro_batches * ways) == 0:
        yield changed("batch", micro_batches=2 * e.batch.micro_batches)
