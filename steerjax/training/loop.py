"""The run, top to bottom: task, state, summary, loop, report."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steerjax.bundle.store import CheckpointStore
from steerjax.config import Experiment, to_json
from steerjax.data.loading import write_skipped
from steerjax.data.packing import Row, packing_statistics, row_pairs
from steerjax.errors import CheckpointError, TrainingError
from steerjax.models.flops import peak_flops, training_flops
from steerjax.parallel.mesh import make_mesh
from steerjax.parallel.processes import ALONE, Processes
from steerjax.report.plots import require_matplotlib
from steerjax.schema import SCHEMAS
from steerjax.training.cache import StateCache
from steerjax.training.input import check_batch, check_tokenizer, make_renderer
from steerjax.training.metrics import MetricsWriter, Progress, read_metrics
from steerjax.training.optimizer import make_optimizer, partition
from steerjax.training.reward import RewardTask
from steerjax.training.schedules import make_schedule
from steerjax.training.sft import SFTTask
from steerjax.training.source import initial_parameters, rated_attributes, with_source
from steerjax.training.state import (
    TrainState,
    abstract_parameters,
    abstract_state,
    fresh_state,
    shardings_of,
    training_part,
)
from steerjax.training.step import make_train_step
from steerjax.training.task import Evaluation, Task, attention_backend
from steerjax.training.workdir import claim_workdir, copy_tokenizer, make_provenance

TASKS = {"reward": RewardTask, "sft": SFTTask}


def train(experiment: Experiment, workdir: Path, processes: Processes = ALONE) -> Evaluation:
    """Trains, or goes on where the workdir's newest checkpoint is, evaluates and reports.

    Returns:
        The evaluation of the last parameters on the validation split.

    Raises:
        SteerjaxError: bad config or data, a workdir of another experiment, gradients that stay non-finite, processes
            that differ or do not come.
    """
    main = processes.index == 0
    if main and experiment.train.plots:
        require_matplotlib()

    # Input
    schema = SCHEMAS[experiment.data.schema]
    experiment, source = with_source(experiment)
    renderer = make_renderer(experiment, schema)
    experiment = _with_vocabulary(experiment, renderer.tokenizer)
    mesh = make_mesh(experiment.mesh)
    task = TASKS[experiment.task](experiment, schema, renderer, mesh)
    check_batch(experiment.batch, task.evaluation_rows, mesh)
    run = Run(experiment, task, mesh)
    provenance = make_provenance(
        experiment, schema, renderer.tokenizer, task.kind, dict(experiment.sft.default_ratings) or None
    )
    provenance["rated_attributes"] = rated_attributes(source, task)
    processes.agree("start", {"jax": jax.__version__, **provenance})
    if main:
        claim_workdir(workdir, experiment, write=True)
        copy_tokenizer(renderer.tokenizer, workdir)
        if task.skipped:
            write_skipped(workdir / "skipped.jsonl", task.skipped)
    processes.barrier("the workdir is there")
    if not (workdir / "config.json").exists():
        raise CheckpointError(
            f"--workdir {workdir}: process {processes.index} does not find there what process 0 wrote; "
            "cure: a folder that all machines share"
        )

    with jax.set_mesh(mesh), CheckpointStore(workdir / "checkpoints", experiment.train.keep_last) as store:
        # State: resume, or start from the source's parameters
        step = store.latest_step()
        processes.agree("start from a checkpoint", {f"newest step in {workdir}": step})
        if step is None:
            state = run.start(*initial_parameters(source, task, run.whole, experiment.train.seed))
        else:
            state = run.resume(*store.restore(step, run.whole, training_part(run.abstract)))
        if main:
            print(summary_text(run.summary()), flush=True)
            if step is not None:
                print(f"resumed at step {step} of {run.steps} from {workdir / 'checkpoints'}", flush=True)

        # Loop
        writer = MetricsWriter(workdir, step or 0, active=main)
        progress = Progress(step or 0, run.steps, active=main)
        try:
            state, evaluation = loop(run, state, step or 0, store, provenance, writer, progress, processes)
        finally:
            progress.close()
            writer.close()

        # Report
        evaluation = evaluation or run.evaluate(state.params, processes)
        store.wait()
        if main:
            report(run, evaluation, workdir, store.best_step())
    return evaluation


def _with_vocabulary(experiment: Experiment, tokenizer) -> Experiment:
    """The vocabulary size 0 becomes the tokenizer's; any other must hold its ids."""
    if experiment.model.vocab_size == 0:
        model = replace(experiment.model, vocab_size=tokenizer.vocab_size)
        experiment = replace(experiment, model=model)
    check_tokenizer(tokenizer, experiment.model.vocab_size)
    return experiment


class Run:
    """What stays the same while a run goes on: task, mesh and the compiled steps.

    Attributes:
        whole: abstract parameters as checkpoints hold them. With `compute.cache_frozen` the state's own lack the
            frozen layers, and their embedding is the table of cached states.
    """

    def __init__(self, experiment: Experiment, task: Task, mesh: Mesh):
        e = experiment
        self.experiment, self.mesh = e, mesh
        self.whole = abstract_parameters(task.model, task.inputs, mesh)
        self.cache = StateCache(task) if e.compute.cache_frozen else None
        self.task = task = self.cache.task if self.cache else task
        self.steps = e.train.steps or task.plan.steps(e.train.epochs)
        self.optimizer = make_optimizer(e.optimizer)
        self.abstract = abstract_state(task.model, task.inputs, self.optimizer, mesh, task.frozen)
        self.states = shardings_of(self.abstract)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        step = make_train_step(task.loss, self.optimizer, make_schedule(e.optimizer, self.steps), task.frozen)
        self.train_step = jax.jit(
            step,
            in_shardings=(self.states, task.feed.shardings),
            out_shardings=(self.states, self.replicated),
            donate_argnums=0,
        )
        self.evaluation_step = jax.jit(
            task.evaluation_step,
            in_shardings=(self.states.params, task.feed.shardings),
            out_shardings=self.replicated,
        )

    def start(self, params: dict, new_head: bool) -> TrainState:
        """The state before the first step, from whole parameters. `new_head`: the head is random, not the source's."""
        begin = jax.jit(
            lambda params, batch: self.task.begin(params, batch, new_head),
            in_shardings=(self.states.params, self.task.feed.shardings),
            out_shardings=self.states.params,
        )
        params = begin(self._enter(params), self.task.feed(self.task.plan.step_rows(0)))
        return fresh_state(params, self.optimizer, self.abstract, self.task.frozen)

    def resume(self, params: dict, training: dict) -> TrainState:
        """The state that a checkpoint holds."""
        return TrainState(params=self._enter(params), **training)

    def _enter(self, params: dict) -> dict:
        return self.cache.fill(params, self.states.params) if self.cache else params

    def whole_parameters(self, params: dict) -> dict:
        """Parameters as checkpoints hold them."""
        return self.cache.whole(params) if self.cache else params

    def evaluate(self, params: dict, processes: Processes = ALONE) -> Evaluation:
        """The task's evaluation of a state's parameters."""

        def step(params, batch):
            processes.at("evaluation")
            return self.evaluation_step(params, batch)

        return self.task.evaluate(step, params)

    def summary(self) -> dict[str, str]:
        """What a user wants to know before the first step."""
        e, plan = self.experiment, self.task.plan
        packed = packing_statistics(plan.groups, plan.epoch(0), e.batch.row_length)
        names = partition(self.whole, e.optimizer.frozen_names)
        trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in names)
        flops = self.step_flops(plan.step_rows(0))[2]
        device = self.mesh.devices.flat[0]
        return {
            "parameters": f"{trained + frozen:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
            "initial parameters": e.model.source,
            **self.task.summary(),
            "skipped": f"{len(self.task.skipped)} rows",
            "packed rows": f"{packed.rows} of {packed.row_length} tokens, {packed.fill:.1%} filled; "
            f"{packed.tokens:,} tokens an epoch",
            "steps": f"{self.steps} of {e.batch.rows} rows, "
            f"about {packed.examples / packed.rows * e.batch.rows:.1f} examples",
            "mesh": ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
            + f"; {self.mesh.size} {device.device_kind} device(s), {jax.process_count()} process(es)",
            "computation": f"{self.task.model.compute.dtype.__name__}, {flops / 1e12:.3f} TFLOP a step (model FLOPs)",
            "attention": "{}: {}".format(*attention_backend(e, device.platform)),
        }

    def step_flops(self, rows: list[Row]) -> tuple[int, int, float]:
        """Examples, tokens (without padding) and model FLOPs of a step."""
        groups = self.task.plan.groups
        tokens = sum(segment.length for row in rows for segment in row)
        pairs = sum(row_pairs(groups, row) for row in rows)
        examples = sum(len(segment.branches) for row in rows for segment in row)
        head = self.task.head_outputs(tokens, examples)
        model, frozen = self.experiment.model, self.experiment.optimizer.frozen_layers
        flops = training_flops(model, tokens, pairs, head, frozen, self.experiment.compute.cache_frozen)
        return examples, tokens, flops


def loop(
    run: Run,
    state: TrainState,
    step: int,
    store: CheckpointStore,
    provenance: dict,
    writer: MetricsWriter,
    progress: Progress,
    processes: Processes = ALONE,
) -> tuple[TrainState, Evaluation | None]:
    """Trains from `step` to the end; the last state, and its evaluation if there was a step to do.

    Step k is dispatched before the metrics of step k-1 are read, so that the device never waits for the host.
    """
    e = run.experiment
    pending = evaluation = None
    clock = time.perf_counter()

    def read(pending) -> bool:
        """Waits for a step's metrics, writes them, and stops the run if gradients stay non-finite.

        Returns:
            Whether a process was asked to stop before that step.
        """
        nonlocal clock
        done, rows, metrics, stop = pending
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, clock = now - clock, now
        record = step_record(run, rows, metrics, seconds)
        if done % max(1, e.train.log_every) == 0 or done == run.steps:
            writer.write(done, "train", record)
        progress.step(done, record["loss"], record["examples_per_second"])
        if metrics["bad_in_row"] >= e.optimizer.max_bad_steps:
            raise TrainingError(
                f"step {done}: gradients were not finite {metrics['bad_in_row']} steps in a row; "
                f"the last good checkpoint is at step {store.latest_step()}\n"
                "  cure: a lower config.optimizer.learning_rate, or float32 (config.compute.dtype)"
            )
        return bool(stop)

    any_process = make_any(run.mesh)
    with stop_on_sigterm() as asked:
        while step < run.steps:
            rows = run.task.plan.step_rows(step)
            state, metrics = run.train_step(state, run.task.feed(rows))
            step += 1
            processes.at(f"step {step}")
            before, pending = pending, (step, rows, metrics, any_process(asked.is_set()))
            stop = before is not None and read(before)

            last = step == run.steps
            checkpoint = last or is_due(step, e.train.checkpoint_every)
            evaluated = checkpoint or is_due(step, e.train.evaluate_every)
            if evaluated or stop:
                stop = read(pending) or stop
                pending = None
                if evaluated:
                    evaluation = evaluate(run, state, step, writer, progress, processes)
                if checkpoint or stop:
                    processes.barrier(f"save step {step}")
                    loss = evaluation.loss if evaluated else None
                    store.save(run.whole_parameters(state.params), training_part(state), step, provenance, loss)
                clock = time.perf_counter()
            if stop and not last:
                store.wait()
                processes.finish()
                raise TrainingError(
                    f"stopped by SIGTERM; step {step} is saved\n  cure: the same command goes on from there"
                )
    return state, evaluation


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def step_record(run: Run, rows: list[Row], metrics: dict, seconds: float) -> dict[str, float]:
    """A training line of metrics.jsonl."""
    examples, tokens, flops = run.step_flops(rows)
    flops_per_device = flops / seconds / run.mesh.size
    record = {
        "loss": float(metrics["loss"]),
        "learning_rate": float(metrics["learning_rate"]),
        "grad_norm": float(metrics["grad_norm"]),
        "bad_steps": int(metrics["bad_steps"]),
        "examples_per_second": examples / seconds,
        "tokens_per_second": tokens / seconds,
        "model_tflops_per_second_per_device": flops_per_device / 1e12,
    }
    peak = peak_flops(run.mesh.devices.flat[0].device_kind)
    if peak is not None:
        record["model_flops_utilization"] = flops_per_device / peak
    return record | run.task.log_values(metrics)


def make_any(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """A function: true on this process -> true on any process, as an array that is not waited for.

    A flag that goes through the mesh behind each step needs no protocol to be seen by all at the same step, and no
    step waits for it.
    """
    every = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    any_of = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda flag: any_of(jax.make_array_from_callback((mesh.size,), every, lambda _: np.full(1, flag)))


def evaluate(
    run: Run, state: TrainState, step: int, writer: MetricsWriter, progress: Progress, processes: Processes = ALONE
) -> Evaluation:
    """Evaluates and writes the record."""
    evaluation = run.evaluate(state.params, processes)
    writer.write(step, "validation", {"loss": evaluation.loss, **evaluation.values})
    progress.say(f"step {step}: validation loss {evaluation.loss:.4f}")
    return evaluation


class stop_on_sigterm:
    """An event that SIGTERM sets while the block runs (a preempted machine sends one some 30 seconds ahead)."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: event.set())
        return event

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def summary_text(summary: dict[str, str]) -> str:
    """The summary as lines, names aligned."""
    width = max(map(len, summary))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in summary.items())


def report(run: Run, evaluation: Evaluation, workdir: Path, best_step: int | None) -> None:
    """Prints the result and writes report/."""
    folder = workdir / "report" if run.experiment.train.plots else None
    records = read_metrics(workdir / "metrics.jsonl")
    print("\n" + run.task.report(evaluation, folder, records, run.summary(), to_json(run.experiment)))
    if best_step is not None and best_step != run.steps:
        print(f"The validation loss was lowest at step {best_step}; that checkpoint is kept too.")
    if folder is not None:
        print(f"report with plots: {folder / 'report.md'}")
