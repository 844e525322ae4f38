"""The run, top to bottom: input, model, state, loop, report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from steerjax.bundle.describe import Provenance, output_names
from steerjax.bundle.store import CheckpointStore
from steerjax.chat.render import Renderer
from steerjax.data.batch import Feeder, evaluation_steps
from steerjax.data.loading import write_skipped
from steerjax.data.packing import Row, packing_statistics
from steerjax.errors import CheckpointError, TrainingError
from steerjax.hf.description import Description
from steerjax.models.flops import peak_flops
from steerjax.objectives import Evaluation
from steerjax.parallel.mesh import make_mesh
from steerjax.parallel.processes import ALONE, Processes
from steerjax.parallel.rules import replicated
from steerjax.report.plots import require_plots
from steerjax.report.records import read_metrics
from steerjax.signals import stop_on_signals
from steerjax.training.cache import FrozenStates, frozen_states
from steerjax.training.config import Experiment
from steerjax.training.input import Input, check_batch, make_feeder, make_input
from steerjax.training.metrics import MetricsWriter, Progress, say_phase
from steerjax.training.program import Program, make_objectives
from steerjax.training.resume import restore_newest, set_damaged_aside
from steerjax.training.source import initial_parameters, new_tokens, resolve_model
from steerjax.training.state import TrainState, make_state
from steerjax.training.trackers import TRACKERS
from steerjax.training.workdir import (
    claim_workdir,
    keep_tokenizer,
    make_provenance,
    only_run,
)


def train(experiment: Experiment, workdir: Path, processes: Processes = ALONE) -> dict[str, Evaluation]:
    """Trains, or goes on where the workdir's newest whole checkpoint is, evaluates and reports.

    Returns:
        Of each objective the evaluation of the last parameters on the validation split.

    Raises:
        SteerjaxError: bad config or data, a workdir of another experiment or in which another process trains, damage,
            gradients that stay non-finite, processes that differ or do not come.
    """
    main = processes.index == 0
    if main and experiment.train.plots:
        require_plots()
    if main:
        for name in experiment.train.trackers:
            TRACKERS[name].check()
    with only_run(workdir, active=main):
        return _train(experiment, workdir, processes)


def _train(experiment: Experiment, workdir: Path, processes: Processes) -> dict[str, Evaluation]:
    main = processes.index == 0

    # ---- Input: rows -> conversations -> examples -> trees -> rows of each step
    e, source, renderer = resolve_model(experiment)
    schema = renderer.schema
    mesh = make_mesh(e.mesh)
    check_batch(e.batch, mesh)
    objectives = make_objectives(e, schema, renderer)
    say_phase("reading and packing the data", active=main)
    data = make_input(e, objectives, renderer)
    states = [FrozenStates(e.model.hidden_size) if e.compute.cache_frozen else None for _ in range(2)]
    feed = make_feeder(data.plan.trees, objectives, e.batch.row_length, mesh, e.batch.micro_batches, states[0])
    feed_validation = make_feeder(data.validation, objectives, e.batch.row_length, mesh, 1, states[1])

    # ---- Model: the module and its steps, from shapes alone
    steps = e.train.steps or data.plan.steps(e.train.epochs)
    program = Program(e, schema, objectives, mesh, feed, steps)
    run = Run(e, data, program, feed, feed_validation, steps)
    provenance = make_provenance(e, schema, renderer, objectives, source)
    processes.agree("start", {"jax": jax.__version__, **dataclasses.asdict(provenance)})
    if main:
        claim_workdir(workdir, e)
        if data.skipped:
            write_skipped(workdir / "skipped.jsonl", data.skipped)
    processes.barrier("the workdir is there")
    if not (workdir / "config.json").exists():
        raise CheckpointError(
            f"--workdir {workdir}: process {processes.index} does not find there what process 0 wrote; "
            "cure: a folder that all machines share"
        )

    checkpoints = workdir / "checkpoints"
    with jax.set_mesh(mesh):
        several = processes.count > 1
        set_damaged_aside(checkpoints, processes, program.any_process, whole=e.train.verify and several)
    with jax.set_mesh(mesh), CheckpointStore(checkpoints, e.train.keep_last) as store:
        # ---- State
        state, step, provenance, new_head = first_state(run, source, renderer, store, provenance, processes)
        if main:
            keep_tokenizer(renderer.tokenizer, workdir)
        summary = run.summary(output_names(source) if source else (), new_head)
        if main:
            print(summary_text(summary), flush=True)
            if step:
                print(f"resumed at step {step} of {steps} from {checkpoints}", flush=True)

        # ---- Loop
        if step < steps:
            say_phase("compiling the step, then the first of them", active=main)
        with MetricsWriter(workdir, step, e.train.trackers, e.to_dict(), active=main) as writer:
            with contextlib.closing(Progress(step, steps, active=main)) as progress:
                evaluation = loop(run, state, step, store, dataclasses.asdict(provenance), writer, progress, processes)

            # ---- Report
            if main:
                report(run, evaluation, summary, workdir, store.best_step())
                if e.train.plots:
                    writer.show(steps, workdir / "report")
    return evaluation


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with."""

    experiment: Experiment
    data: Input
    program: Program
    feed: Feeder
    feed_validation: Feeder
    steps: int

    def cache_frozen(self, params: dict, active: bool) -> None:
        """Runs the frozen layers over all data, and keeps what they give."""
        e, size, data = self.experiment, self.experiment.batch.evaluated, self.data
        states = frozen_states(self.program.module, e.optimizer.frozen_layers, self.program.mesh)
        passes = [(self.feed, data.plan.epoch(0)), (self.feed_validation, data.validation_rows)]
        count, counter = sum(-(-len(rows) // size) for _, rows in passes), itertools.count(1)
        with contextlib.closing(Progress(0, count, active=active, what="frozen layers")) as progress:
            for feed, rows in passes:
                once = dataclasses.replace(feed, micro_batches=1)
                feed.build.states.fill(states, params, once, rows, size, lambda: progress.step(next(counter)))

    def evaluate(
        self, state: TrainState, processes: Processes = ALONE, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Evaluation] | None:
        """Every objective on the validation split; None where `stop`, asked before each step, said so.

        Raises FloatingPointError: an output is not finite.
        """
        collected = []
        for rows in evaluation_steps(self.data.validation_rows, self.experiment.batch.evaluated):
            if stop():
                return None
            processes.at("evaluation")
            outputs = self.program.evaluation_step(state.params, state.frozen, self.feed_validation(rows))
            outputs = jax.device_get(outputs)
            if not all(np.isfinite(x).all() for x in jax.tree.leaves(outputs)):
                raise FloatingPointError("what the model says of the validation split is not finite")
            collected.append(([self.feed_validation.build.layout(row) for row in rows], outputs))
        return {
            o.name: o.evaluate([(layouts, outputs[o.name]) for layouts, outputs in collected])
            for o in self.program.objectives
        }

    def loss(self, evaluation: dict[str, Evaluation]) -> float:
        """The objectives' validation losses, each with its weight."""
        return sum(o.config.weight * evaluation[o.name].loss for o in self.program.objectives)

    def summary(self, predicted: tuple[str, ...], new_head: bool) -> dict[str, str]:
        """What a user wants to know before the first step. `predicted`: by the source's reward head."""
        e, plan, program = self.experiment, self.data.plan, self.program
        packed = packing_statistics(plan.trees, plan.epoch(0), e.batch.row_length)
        total, trained = (sum(x.size for x in jax.tree.leaves(t)) for t in (program.whole, program.abstract.params))
        device = program.mesh.devices.flat[0]
        said = {
            "parameters": f"{total:,}" + (f", {total - trained:,} of them frozen" if total > trained else ""),
            "initial parameters": e.model.source,
        }
        if program.kind == "reward":
            said["reward head"] = "the source's" if predicted and not new_head else "new"
            if new_head and predicted:
                said["reward head"] += f"; the source's predicts {', '.join(predicted)}"
        said |= self.data.said
        for o in program.objectives:
            said |= o.summary()
        flops = program.step_facts(plan.step_rows(0), plan.trees)["flops"]
        return said | {
            "skipped": f"{len({(row.file, row.line) for row in self.data.skipped})} rows",
            "packed rows": f"{packed.rows} of {packed.row_length} tokens, {packed.fill:.1%} filled; "
            f"{packed.examples} examples in {len(plan.trees)} trees, {packed.tokens:,} tokens an epoch",
            "sharing": f"{packed.saving:.2f} times as many tokens without it",
            "steps": f"{self.steps} of {e.batch.rows} rows, "
            f"about {packed.examples / packed.rows * e.batch.rows:.1f} examples",
            "mesh": ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
            + f"; {program.mesh.size} {device.device_kind} device(s), {jax.process_count()} process(es)",
            "computation": f"{program.module.compute.dtype.name}, {flops / 1e12:.3f} TFLOP a step (model FLOPs)",
            "attention": "{}: {}".format(*program.attention),
        }


def first_state(
    run: Run,
    source: Description | None,
    renderer: Renderer,
    store: CheckpointStore,
    now: Provenance,
    processes: Processes,
) -> tuple[TrainState, int, Provenance, bool]:
    """State, step and provenance that the run goes on from, and whether its head is new.

    It is (1) the newest checkpoint, or (2) the source's parameters, or (3) random ones.
    """
    e, program, main = run.experiment, run.program, processes.index == 0
    say_phase("opening the parameters" if source or store.latest_step() else "making parameters", active=main)
    step, provenance, whole, rest = restore_newest(store, program, now, e.train, run.steps, processes)
    new_head = False
    if not step:
        tokens, names = new_tokens(renderer, source), renderer.schema.names
        whole, new_head = initial_parameters(source, program.module, program.whole, names, e.train.seed, tokens)
    if e.compute.cache_frozen:
        run.cache_frozen(whole, active=main)
    if new_head:
        whole = program.with_new_heads(whole, run.feed(run.data.plan.step_rows(0)))
    return make_state(whole, program.abstract, program.optimizer, e.optimizer, rest), step, provenance, new_head


def loop(
    run: Run,
    state: TrainState,
    step: int,
    store: CheckpointStore,
    provenance: dict,
    writer: MetricsWriter,
    progress: Progress,
    processes: Processes = ALONE,
) -> dict[str, Evaluation]:
    """Trains from `step` to the end; the evaluation of the last parameters.

    Step k is dispatched before the metrics of step k-1 are read, so that the device never waits for the host.
    """
    e, pending, evaluation, clock = run.experiment, None, None, 0.0

    def read(pending) -> bool:
        """Waits for a step's metrics and writes them; whether a process was asked to stop before that step."""
        nonlocal clock
        done, rows, metrics, stop = pending
        metrics = jax.device_get(metrics)
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        record = step_record(run, rows, metrics, seconds)
        if done % max(1, e.train.log_every) == 0 or done == run.steps:
            writer.write(done, "train", record)
        progress.step(done, f"loss {record['loss']:.4f}, {record['examples_per_second']:.1f} examples/s")
        if metrics["bad_in_row"] >= min(e.optimizer.max_bad_steps, run.steps):
            raise not_finite(done, f"gradients were not finite {metrics['bad_in_row']} steps in a row")
        return bool(stop)

    def not_finite(step: int, what: str) -> TrainingError:
        saved = "no checkpoint was" if store.latest_step() is None else f"step {store.latest_step()} is"
        cure = "a lower config.optimizer.learning_rate, or float32 (config.compute.dtype)"
        return TrainingError(f"step {step}: {what}; {saved} saved\n  cure: {cure}")

    def evaluate(write: bool = True, **options) -> dict[str, Evaluation] | None:
        try:
            found = run.evaluate(state, processes, **options)
        except FloatingPointError as error:
            raise not_finite(step, str(error)) from None
        if write and found:
            loss = run.loss(found)
            each = {f"{name}/loss": one.loss for name, one in found.items()} if len(found) > 1 else {}
            values = {key: value for one in found.values() for key, value in one.values.items()}
            writer.write(step, "validation", {"loss": loss, **each, **values})
            progress.say(f"step {step}: validation loss {loss:.4f}")
        return found

    def is_due(every: int) -> bool:
        return every > 0 and step > 0 and step % every == 0

    # A run that was asked to stop saves before it evaluates; what it owed is done here, by all processes or none.
    any_process = run.program.any_process
    evaluated = bool(any_process(writer.evaluated))
    owed = (is_due(e.train.checkpoint_every) or is_due(e.train.evaluate_every)) and not evaluated
    if owed or step == run.steps:
        evaluation = evaluate(write=not evaluated)
    are_finite = jax.jit(
        lambda tree: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all(),
        out_shardings=replicated(run.program.mesh),
    )
    with stop_on_signals() as asked:
        clock = time.perf_counter()
        while step < run.steps:
            rows = run.data.plan.step_rows(step)
            state, metrics = run.program.train_step(state, run.feed(rows))
            step += 1
            processes.at(f"step {step}")
            store.check()
            before, pending = pending, (step, rows, metrics, any_process(asked.is_set()))
            stop = before is not None and read(before)

            checkpoint = step == run.steps or is_due(e.train.checkpoint_every)
            if stop or checkpoint or is_due(e.train.evaluate_every):
                stop = read(pending) or stop
                pending = None
                if not stop:
                    evaluation = evaluate(stop=lambda: bool(any_process(asked.is_set())))
                    stop = evaluation is None
                if stop or checkpoint:
                    if not are_finite(state.params):
                        raise not_finite(step, "parameters are not finite")
                    processes.barrier(f"save step {step}")
                    loss = None if stop else run.loss(evaluation)
                    store.save(state.whole(), state.rest(), step, provenance, loss)
                clock = time.perf_counter()
            if step == run.steps:  # nothing is lost from here on, whatever comes
                store.wait()
                stop = stop or bool(any_process(asked.is_set()))
            if stop:
                store.wait()
                processes.finish()
                raise TrainingError(
                    f"stopped by a signal; step {step} is saved\n  cure: the same command goes on from there"
                )
    return evaluation


def step_record(run: Run, rows: list[Row], metrics: dict, seconds: float) -> dict[str, float]:
    """A training line of metrics.jsonl."""
    facts = run.program.step_facts(rows, run.data.plan.trees)
    flops = facts.pop("flops") / seconds / run.program.mesh.size
    record = {name: float(metrics[name]) for name in ("loss", "learning_rate", "grad_norm")}
    record |= {"bad_steps": int(metrics["bad_steps"])}
    record |= {f"{name}_per_second": count / seconds for name, count in facts.items()}
    record["model_tflops_per_second_per_device"] = flops / 1e12
    if peak := peak_flops(run.program.mesh.devices.flat[0].device_kind):
        record["model_flops_utilization"] = flops / peak
    several = len(run.program.objectives) > 1
    own = {k: float(v) for k, v in metrics.items() if k not in (*record, "bad_in_row")}
    return record | {k: v for k, v in own.items() if several or not k.endswith("/loss")}


def summary_text(summary: dict[str, str]) -> str:
    """The summary as lines, names aligned."""
    width = max(map(len, summary))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in summary.items())


def report(run: Run, evaluation: dict[str, Evaluation], summary, workdir: Path, best_step: int | None) -> None:
    """Prints the result and writes report/, a folder in it for each objective where there are several."""
    e, objectives = run.experiment, run.program.objectives
    records = read_metrics(workdir / "metrics.jsonl")
    if bad := max((record.get("bad_steps") or 0 for record in records), default=0):
        summary = summary | {"skipped steps": f"{bad} of {run.steps}, whose loss or gradients were not finite"}
        print(f"\nskipped steps: {summary['skipped steps']}")
    for o in objectives:
        folder = workdir / "report" / o.name if len(objectives) > 1 else workdir / "report"
        print("\n" + o.report(evaluation[o.name], folder if e.train.plots else None, records, summary, e.to_json()))
        if e.train.plots:
            print(f"report with plots: {folder / 'report.html'}")
    if best_step is not None and best_step != run.steps:
        print(f"The validation loss was lowest at step {best_step}; that checkpoint is kept too.")
