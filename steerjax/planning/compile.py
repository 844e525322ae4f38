"""The train step of an experiment, compiled for devices that are not there: does it fit, or which change makes it?"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax

from steerjax.chat.render import make_renderer
from steerjax.errors import ConfigError
from steerjax.models.config import REMAT
from steerjax.models.flops import GIB
from steerjax.objectives import predicted_schema
from steerjax.parallel.mesh import AXES, MeshConfig, make_mesh, mesh_shape
from steerjax.planning.hlo import Work, work
from steerjax.planning.topology import Topology
from steerjax.training.config import Experiment
from steerjax.training.input import check_batch, make_feeder
from steerjax.training.program import Program, make_objectives
from steerjax.training.source import resolve_model, with_frozen_base

# Part of a device's memory that a plan leaves free: the next batch, the evaluation's program, fragments.
RESERVE = 0.05
KERNELS = ("splash", "cudnn", "triton")  # of attention: a program's text does not say what they compute


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of a step. Where it needs more than a device has, there are no `parts` and no `text`."""

    seconds: float  # of compiling
    parameters: int  # of the model
    flops: float  # model FLOPs of a step whose rows are full, each with one text
    attention: str  # the back end that was chosen for the machine
    used: float  # bytes on one device
    parts: Mapping[str, float]  # bytes of arguments, outputs, outputs that lie where the old state lay, and temporaries
    text: str  # of the program; "", too, where XLA fails to print it (libtpu 0.0.52: an INTERNAL error)
    products: float = 0.0  # the part of `flops` that the text's matrix products do: without attention, in a kernel
    work: Work | None = None  # what the text says, where there is one

    def fits(self, hbm_bytes: float) -> bool:
        """Within a device's memory less the reserve."""
        return bool(self.parts) and self.used <= (1 - RESERVE) * hbm_bytes


# What a variant changes, as flags of the command (none for the experiment itself), the variant, and what came out.
Attempt = tuple[tuple[str, ...], Experiment, Compiled]


def plannable(experiment: Experiment, devices: int) -> Experiment:
    """The experiment with everything filled in that its step depends on.

    A config that gives `model.vocab_size` is taken at its word, so that no gated model has to be downloaded for a plan;
    else the source, or the tokenizer, is read. Raises ConfigError: the mesh does not fit the devices.
    """
    e = experiment
    if e.compute.cache_frozen:
        cure = "--config.compute.cache_frozen=False, which needs more memory"
        raise ConfigError(
            f"config.compute.cache_frozen: its size is the data's, which a plan does not read; cure: {cure}"
        )
    if e.model.vocab_size:
        e = replace(e, model=replace(e.model, num_layers=e.model.keep_layers or e.model.num_layers))
    else:
        e, _, _ = resolve_model(e)
    e = with_frozen_base(e)
    mesh, steps = MeshConfig(*mesh_shape(e.mesh, devices)), e.train.steps or 1_000_000
    return replace(e, mesh=mesh, train=replace(e.train, steps=steps))


def compile_step(e: Experiment, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles the step that `train` would run, with state and batch as shapes; `e` is as `plannable` returns it.

    Raises ConfigError: a batch or a parameter that the mesh does not divide.
    """
    mesh, schema = make_mesh(e.mesh, list(devices)), predicted_schema(e.objective, e.data.make_schema())
    check_batch(e.batch, mesh)
    # Objectives see no row, so any tokenizer and template do; these are always there.
    chat = replace(e.chat, tokenizer="embedded", template="extra_id", labels="numbers")
    objectives = make_objectives(e, schema, make_renderer(chat, schema))
    feed = make_feeder((), objectives, e.batch.row_length, mesh, e.batch.micro_batches)
    program = Program(e, schema, objectives, mesh, feed, e.train.steps)
    tokens = e.batch.rows * e.batch.row_length
    learnt = tokens if program.kind == "chat" else e.batch.rows
    flops, products = (program.flops(tokens, pairs, learnt) for pairs in (tokens * (e.batch.row_length + 1) // 2, 0))
    if program.attention.name not in KERNELS:
        products = flops
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.whole))
    start, text, parts = time.perf_counter(), "", {}
    with jax.set_mesh(mesh):
        lowered = program.train_step.lower(program.abstract, feed.abstract(e.batch.rows))
        try:
            compiled = lowered.compile()
            stats = compiled.memory_analysis()
            parts = {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
            used = sum(parts.values()) - 2 * parts["alias"] + stats.generated_code_size_in_bytes
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            used = used_bytes(error)
    seconds = time.perf_counter() - start
    done = work(text, len(devices)) if text else None
    return Compiled(seconds, parameters, flops, program.attention.name, used, parts, text, products, done)


def used_bytes(error: Exception) -> float:
    """Bytes that the TPU compiler says it would need, arguments included; raises any other error."""
    message = str(error)
    used = re.search(r"Used ([\d.]+)([KMGT]) of|memory required for .*?\(([\d.]+)([KMGT])\) exceeds", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        raise error
    number, unit = used[1] or used[3], used[2] or used[4]
    return float(number) * 2.0 ** (10 * ("KMGT".index(unit) + 1))


def find_cure(e: Experiment, devices: Sequence[jax.Device], hbm_bytes: float) -> Iterator[Attempt]:
    """Compiles the experiment, then variants, each going on from the last, until one fits."""
    for flags, variant in _variants(plannable(e, len(devices))):
        compiled = compile_step(variant, devices)
        yield flags, variant, compiled
        if compiled.fits(hbm_bytes):
            return


def _variants(e: Experiment) -> Iterator[tuple[tuple[str, ...], Experiment]]:
    """The cheapest change first: state over more devices, then recomputation, then smaller parts of the batch."""
    flags: dict[str, object] = {}

    def changed(group: str, **values) -> tuple[tuple[str, ...], Experiment]:
        nonlocal e
        e = replace(e, **{group: replace(getattr(e, group), **values)})
        flags.update({f"--config.{group}.{key}": value for key, value in values.items()})
        return tuple(f"{key}={value}" for key, value in flags.items()), e

    yield (), e
    if e.mesh.data > 1:
        yield changed("mesh", data=1, fsdp=e.mesh.data * e.mesh.fsdp)
    for policy in REMAT[REMAT.index(e.compute.remat) + 1 :]:
        yield changed("compute", remat=policy)
    ways = e.mesh.data * e.mesh.fsdp
    while e.batch.rows % (2 * e.batch.micro_batches * ways) == 0:
        yield changed("batch", micro_batches=2 * e.batch.micro_batches)


def attempt_text(attempt: Attempt, topology: Topology) -> str:
    """Everything that compiling one variant said."""
    (flags, e, c), hbm = attempt, topology.chip.hbm_bytes
    facts = {
        "change": " ".join(flags) or "none: the experiment as it is",
        "mesh": ", ".join(f"{axis} {getattr(e.mesh, axis)}" for axis in AXES),
        "step": f"{e.batch.rows} rows of {e.batch.row_length} tokens in {e.batch.micro_batches} micro-batches; "
        f"remat {e.compute.remat}, {c.attention} attention",
        "parameters": f"{c.parameters:,}",
        "model FLOPs": f"{c.flops / 1e15:.3f} PFLOP a step of full rows, one text each",
        "compile time": f"{c.seconds:.0f} s here",
        "memory": f"{'fits' if c.fits(hbm) else 'DOES NOT FIT'}: {c.used / GIB:.2f} of {hbm / GIB:.2f} GiB a device, "
        f"{RESERVE:.0%} of them kept free",
    }
    if c.parts:
        facts["of which"] = ", ".join(f"{name} {size / GIB:.2f}" for name, size in c.parts.items()) + " GiB"
    if c.work:
        facts |= work_facts(c, topology.devices)
    elif c.parts:
        facts["compiled FLOPs"] = "the compiler cannot print this program"
    if (n := e.mesh.context) > 1:
        facts["context"] = (
            f"uneven: attention of the last of {n} parts of a causal row is {2 - 1 / n:.2f} times the mean"
        )
    return "\n".join(f"{name:>16}  {value}" for name, value in facts.items())


def work_facts(c: Compiled, devices: int) -> dict[str, str]:
    """What the compiled program does, beside what the model asks for."""
    w, kinds = c.work, {}
    for one in w.collectives:
        times, size = kinds.get(one.kind, (0, 0.0))
        kinds[one.kind] = times + one.times, size + one.received
    said = f"{devices * w.flops / 1e15:.3f} PFLOP of matrix products, {devices * w.flops / c.products:.2f} times the "
    said += f"model's; {devices * w.recomputed / 1e15:.3f} of them computed again"
    if c.attention in KERNELS:
        said += "; attention's kernels are not counted"
    if not w.exact:
        said += "; loops of unknown length are counted once"
    return {
        "compiled FLOPs": said,
        "memory traffic": f"{w.bytes / GIB:.0f} GiB a device in a step, by the shapes that instructions read and write",
        "collectives": "; ".join(
            f"{times} {kind}, {size / GIB:.2f} GiB" for kind, (times, size) in sorted(kinds.items())
        ) + " received by a device in a step" if kinds else "none",
    }  # fmt: skip


def verdict_text(attempts: Sequence[Attempt], topology: Topology) -> str:
    """The last words of a plan."""
    flags, _, last = attempts[-1]
    machine = f"{topology.name} ({topology.devices} devices)"
    if not last.fits(topology.chip.hbm_bytes):
        return (
            f"verdict: does not fit {machine}, and neither remat, micro-batches nor fsdp make it "
            f"({attempts[0][2].used / GIB:.1f} GiB at first, {last.used / GIB:.1f} GiB at last); "
            "cure: more devices, shorter rows, or tensor parallelism (--config.mesh.tensor)"
        )
    if flags:
        return f"verdict: does not fit {machine} as it is; it fits with\n  {' '.join(flags)}"
    return f"verdict: fits {machine}"
