"""The train step of an experiment, compiled for devices that are described and not there."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax

from steerjax.chat.config import make_renderer
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.errors import ConfigError
from steerjax.parallel.mesh import AXES, make_mesh, mesh_shape
from steerjax.training.config import Experiment
from steerjax.training.input import check_batch, make_feeder
from steerjax.training.program import Program, make_objectives
from steerjax.training.source import with_source


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of a step.

    Attributes:
        seconds: compile time.
        parameters: of the model.
        flops: model FLOPs of a step whose rows are full, each with one text.
        attention: the back end that was chosen for the machine.
        used: bytes on one device. Where that is more than the device has, there are no `parts` and no `text`.
        parts: of them: `argument`s (state and batch), `output`s, of which `alias` lie where the old state lay, and the
            most `temp`oraries that are held at a time (activations, gathered parameters, gradients).
        text: "", too, where XLA fails to print a program (libtpu 0.0.52: an INTERNAL error).
    """

    seconds: float
    parameters: int
    flops: float
    attention: str
    used: float
    parts: Mapping[str, float]
    text: str


def plannable(experiment: Experiment, devices: int) -> Experiment:
    """The experiment with everything filled in that its step depends on.

    A config that gives an architecture (`model.vocab_size`) is taken at its word, so that no gated model has to be
    downloaded for a plan; else the source, or the tokenizer, is read.

    Raises:
        ConfigError: the mesh does not fit the devices, the batch does not fit the mesh.
    """
    e = experiment
    if e.compute.cache_frozen:
        raise ConfigError(
            "config.compute.cache_frozen: the size of the cache follows from the data, which a plan does not read; "
            "cure: plan with --config.compute.cache_frozen=False, which needs more memory"
        )
    if e.model.vocab_size == 0:
        e, _ = with_source(e)
    if e.model.vocab_size == 0:
        e = replace(e, model=replace(e.model, vocab_size=load_tokenizer(e.chat.tokenizer).vocab_size))
    sizes = dict(zip(AXES, mesh_shape(e.mesh, devices), strict=True))
    return replace(e, mesh=replace(e.mesh, **sizes), train=replace(e.train, steps=e.train.steps or 1_000_000))


def compile_step(experiment: Experiment, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles the step that `train` would run, with the state and the batch as shapes.

    Args:
        experiment: as `plannable` returns it.

    Raises:
        ConfigError: a batch or a parameter that the mesh does not divide.
    """
    e = experiment
    mesh, schema = make_mesh(e.mesh, list(devices)), e.data.make_schema()
    check_batch(e.batch, mesh)
    # Objectives see no row, so any tokenizer does; the embedded one is always there.
    renderer = make_renderer(replace(e.chat, tokenizer="embedded"), schema)
    objectives = make_objectives(e, schema, renderer)
    feed = make_feeder((), objectives, e.batch.row_length, mesh, e.batch.micro_batches)
    program = Program(e, schema, objectives, mesh, feed, e.train.steps)
    tokens = e.batch.rows * e.batch.row_length
    flops = program.flops(tokens, tokens * (e.batch.row_length + 1) // 2, e.batch.rows)
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
    return Compiled(time.perf_counter() - start, parameters, flops, program.attention.name, used, parts, text)


def used_bytes(error: Exception) -> float:
    """Bytes that the TPU compiler says it would need, arguments included; raises any other error."""
    message = str(error)
    used = re.search(r"Used ([\d.]+)([KMGT]) of|memory required for .*?\(([\d.]+)([KMGT])\) exceeds", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        raise error
    number, unit = used[1] or used[3], used[2] or used[4]
    return float(number) * 2.0 ** (10 * ("KMGT".index(unit) + 1))
