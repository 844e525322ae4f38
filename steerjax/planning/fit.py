"""Does a step fit, and if not, which change makes it fit: tried one after the other, each by compiling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from steerjax.models.flops import GIB
from steerjax.planning.compile import Compiled
from steerjax.planning.topology import Topology
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
    return bool(compiled.parts) and compiled.used <= (1 - RESERVE) * hbm_bytes


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


def attempt_text(attempt: Attempt, topology: Topology) -> str:
    """Everything that compiling one variant said."""
    e, c, hbm = attempt.experiment, attempt.compiled, topology.chip.hbm_bytes
    facts = {
        "change": " ".join(attempt.flags) or "none: the experiment as it is",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in vars(e.mesh).items()),
        "step": f"{e.batch.rows} rows of {e.batch.row_length} tokens in {e.batch.micro_batches} micro-batches; "
        f"remat {e.compute.remat}, {c.attention} attention",
        "parameters": f"{c.parameters:,}",
        "model FLOPs": f"{c.flops / 1e15:.3f} PFLOP a step of full rows, one text each",
        "compile time": f"{c.seconds:.0f} s here",
        "memory": f"{'fits' if attempt.good else 'DOES NOT FIT'}: {c.used / GIB:.2f} of {hbm / GIB:.2f} GiB a device, "
        f"{RESERVE:.0%} of them kept free",
    }
    if c.parts:
        facts["of which"] = ", ".join(f"{name} {size / GIB:.2f}" for name, size in c.parts.items()) + " GiB"
    if (parts := e.mesh.context) > 1:
        share = (2 * parts - 1) / parts
        facts["context"] = (
            f"attention is uneven: the last of {parts} parts of a causal row has {share:.2f} times the mean"
        )
    return "\n".join(f"{name:>16}  {value}" for name, value in facts.items())


def verdict_text(attempts: list[Attempt], topology: Topology) -> str:
    """The last words of a plan."""
    first, last = attempts[0], attempts[-1]
    machine = f"{topology.name} ({topology.devices} devices)"
    if first.good:
        return f"verdict: fits {machine}"
    if last.good:
        return f"verdict: does not fit {machine} as it is; it fits with\n  {' '.join(last.flags)}"
    return (
        f"verdict: does not fit {machine}, and neither remat, micro-batches nor fsdp make it "
        f"({first.compiled.used / GIB:.1f} GiB at first, {last.compiled.used / GIB:.1f} GiB at last); "
        "cure: more devices, shorter rows, or tensor parallelism (--config.mesh.tensor)"
    )
