"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from steerjax.models.flops import GIB
from steerjax.planning.compile import Compiled
from steerjax.planning.fit import RESERVE, Attempt
from steerjax.planning.hlo import KINDS, Collective
from steerjax.planning.roofline import COMPUTE_PART, LINK_PART, MEMORY_PART, roofline
from steerjax.planning.topology import Topology
from steerjax.training.config import Experiment


def attempt_text(attempt: Attempt, topology: Topology) -> str:
    """Everything that compiling one variant said."""
    e, c = attempt.experiment, attempt.compiled
    facts = {
        "change": " ".join(attempt.flags) or "none: the experiment as it is",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in vars(e.mesh).items()),
        "step": f"{e.batch.rows} rows of {e.batch.row_length} tokens in {e.batch.micro_batches} micro-batches; "
        f"remat {e.compute.remat}, {c.attention} attention",
        "parameters": f"{c.parameters:,}",
        "model FLOPs": f"{c.flops / 1e15:.3f} PFLOP a step of full rows, one text each",
        "compile time": f"{c.seconds:.0f} s here",
        **_memory_facts(attempt, topology),
    }
    if c.text:
        facts |= _collective_facts(c.collectives)
    elif c.memory:
        facts["collectives"] = "not known, XLA fails to print this program; the time below leaves the links out"
    if c.memory:
        facts |= _time_facts(e, c, topology)
    return "\n".join(f"{name:>16}  {value}" for name, value in facts.items())


def _memory_facts(attempt: Attempt, topology: Topology) -> dict[str, str]:
    c, hbm = attempt.compiled, topology.chip.hbm_bytes
    verdict = "fits" if attempt.good else "DOES NOT FIT"
    room = f"{c.used / GIB:.2f} of {hbm / GIB:.2f} GiB a device, {RESERVE:.0%} of them kept free"
    if c.memory is None:
        return {"memory": f"{verdict}: the compiler would need {room}"}
    parts = ", ".join(
        f"{name} {getattr(c.memory, name) / GIB:.2f}" for name in ("arguments", "temporaries", "outputs", "aliased")
    )
    return {"memory": f"{verdict}: {room}", "of which": f"{parts} GiB"}


def _collective_facts(found: Sequence[Collective]) -> dict[str, str]:
    facts = {}
    for kind in KINDS:
        if group := [c for c in found if c.kind == kind]:
            least = "" if all(c.exact for c in group) else "at least "
            largest = max(group, key=lambda c: c.bytes)
            facts[kind] = (
                f"{least}{sum(c.times for c in group)} a step, {sum(c.received for c in group) / GIB:.2f} GiB received "
                f"a device; largest {largest.bytes / 2**20:.1f} MiB {list(largest.shape)}"
            )
    return facts or {"collectives": "none"}


def _time_facts(e: Experiment, c: Compiled, topology: Topology) -> dict[str, str]:
    r = roofline(e, topology, c)
    peak = topology.chip.peak_flops * topology.devices
    flops = [c.flops / seconds / peak for seconds in (r.overlapped, r.in_turn)]
    rate = c.tokens / r.overlapped / topology.devices
    return {
        "a step takes": f"about {r.overlapped:.2f} s where all overlaps ({flops[0]:.0%} of the peak FLOP/s, "
        f"{rate:,.0f} tokens/s a device), {r.in_turn:.2f} s where nothing does ({flops[1]:.0%})",
        "estimated from": f"compute {r.compute:.2f} s at {COMPUTE_PART:.0%} of the peak, recomputation included; "
        f"memory {r.memory:.2f} s at {MEMORY_PART:.0%}; links {r.links:.2f} s at {LINK_PART:.0%}; not measured",
    }


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
