"""The run, top to bottom: input, model, state, summary, loop, report."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steerjax import __version__
from steerjax.attributes import SCHEMAS, AttributeSchema
from steerjax.checkpoints.store import CheckpointStore
from steerjax.config import Experiment, to_dict, to_json
from steerjax.data.batch import BatchPlan, evaluation_steps
from steerjax.data.loading import file_hashes, write_skipped
from steerjax.data.packing import Row, pack, packing_statistics, row_pairs
from steerjax.errors import CheckpointError, TrainingError
from steerjax.evaluation.report import format_table, require_matplotlib, write_report
from steerjax.evaluation.results import EvaluationResult, evaluate_predictions
from steerjax.models.flops import peak_flops, training_flops
from steerjax.models.llama import Compute
from steerjax.models.reward_head import RewardModel
from steerjax.objectives.regression import masked_squared_error
from steerjax.parallel.mesh import make_mesh
from steerjax.training.input import (
    Feeder,
    RewardData,
    batch_shardings,
    check_batch,
    check_tokenizer,
    load_splits,
    make_renderer,
    row_examples,
)
from steerjax.training.metrics import MetricsWriter, Progress, read_metrics
from steerjax.training.optimizer import make_optimizer
from steerjax.training.schedules import make_schedule
from steerjax.training.state import TrainState, abstract_state, init_state, restore_state, shardings_of, training_part
from steerjax.training.step import make_evaluation_step, make_head_initializer, make_loss, make_train_step


def train_reward_model(experiment: Experiment, workdir: Path) -> EvaluationResult:
    """Trains, or goes on where the workdir's newest checkpoint is, evaluates and reports.

    Returns:
        Predictions and metrics of the last parameters on the validation split.

    Raises:
        SteerjaxError: bad config or data, a workdir of another experiment, gradients that stay non-finite.
    """
    main = jax.process_index() == 0
    if main and experiment.train.plots:
        require_matplotlib()

    # Input
    schema = SCHEMAS[experiment.data.schema]
    renderer = make_renderer(experiment, schema)
    if experiment.model.vocab_size == 0:
        model_config = dataclasses.replace(experiment.model, vocab_size=renderer.tokenizer.vocab_size)
        experiment = dataclasses.replace(experiment, model=model_config)
    check_tokenizer(renderer.tokenizer, experiment.model.vocab_size)
    train, validation, skipped = load_splits(experiment, schema, renderer)
    claim_workdir(workdir, experiment, write=main)
    if main and skipped:
        write_skipped(workdir / "skipped.jsonl", skipped)
    run = Run(experiment, schema, make_mesh(experiment.mesh), train, validation)
    check_batch(experiment.batch, run.evaluation_rows, run.mesh)
    provenance = make_provenance(experiment, schema, renderer.tokenizer.hash)

    with jax.set_mesh(run.mesh), CheckpointStore(workdir / "checkpoints", experiment.train.keep_last) as store:
        # State: resume, or start from random parameters
        step = store.latest_step()
        state = run.fresh_state() if step is None else restore_state(store, step, run.abstract)
        if main:
            print(summary_text(run.summary(len(skipped))), flush=True)
            if step is not None:
                print(f"resumed at step {step} of {run.steps} from {workdir / 'checkpoints'}", flush=True)

        # Loop
        writer = MetricsWriter(workdir, step or 0, active=main)
        progress = Progress(step or 0, run.steps, active=main)
        try:
            state = loop(run, state, step or 0, store, provenance, writer, progress)
        finally:
            progress.close()
            writer.close()

        # Report
        result = run.evaluate(state.params)[1]
        store.wait()
        if main:
            report(run, result, workdir, store.best_step(), len(skipped))
    return result


class Run:
    """What stays the same while a run goes on: data, plan, mesh and the compiled steps."""

    def __init__(
        self, experiment: Experiment, schema: AttributeSchema, mesh: Mesh, train: RewardData, validation: RewardData
    ):
        e, batch = experiment, experiment.batch
        self.experiment, self.schema, self.mesh = experiment, schema, mesh
        self.train, self.validation = train, validation
        responses = batch.responses_per_row or max(1, batch.row_length // 32)
        self.plan = BatchPlan(train.groups, batch.rows, batch.row_length, responses, e.train.seed)
        self.steps = e.train.steps or self.plan.steps(e.train.epochs)
        self.evaluation_rows = batch.evaluation_rows or batch.rows // batch.micro_batches
        self.validation_rows = pack(validation.groups, batch.row_length, responses, range(len(validation.groups)))
        self.feed = Feeder(train.groups, batch.row_length, responses, batch.micro_batches, mesh)
        self.feed_validation = Feeder(validation.groups, batch.row_length, responses, 1, mesh)

        self.model = make_model(e, len(schema))
        self.optimizer = make_optimizer(e.optimizer)
        self.abstract = abstract_state(self.model, self.optimizer, mesh, e.optimizer.frozen)
        self.weights = np.array([e.objective.attribute_weights.get(name, 1.0) for name in schema.names], np.float32)
        loss = make_loss(self.model, self.weights, e.objective.average)
        schedule = make_schedule(e.optimizer, self.steps)
        step = make_train_step(loss, self.optimizer, schedule, e.optimizer.frozen)
        self.states, self.batches = shardings_of(self.abstract), batch_shardings(mesh)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.train_step = jax.jit(
            step,
            in_shardings=(self.states, self.batches),
            out_shardings=(self.states, self.replicated),
            donate_argnums=0,
        )
        self.evaluation_step = jax.jit(
            make_evaluation_step(self.model),
            in_shardings=(self.states.params, self.batches),
            out_shardings=self.replicated,
        )

    def fresh_state(self) -> TrainState:
        """Random parameters, and a head whose first predictions lie near the mean ratings."""
        e = self.experiment
        state = init_state(self.model, self.optimizer, self.abstract, e.train.seed, e.optimizer.frozen)
        initialize = jax.jit(
            make_head_initializer(self.model),
            in_shardings=(self.states.params, self.batches, self.replicated),
            out_shardings=self.states.params,
        )
        batch = self.feed(self.plan.step_rows(0))
        return state.replace(params=initialize(state.params, batch, self.train.mean_ratings()))

    def evaluate(self, params) -> tuple[float, EvaluationResult]:
        """Validation loss (the training objective) and everything that is measured on the validation split."""
        data = self.validation
        predicted = np.zeros_like(data.ratings)
        for rows in evaluation_steps(self.validation_rows, self.evaluation_rows):
            outputs = np.asarray(self.evaluation_step(params, self.feed_validation(rows)))
            for row, output in zip(rows, outputs, strict=True):
                examples = row_examples(data.groups, row)
                predicted[examples] = output[: len(examples)]
        total, count = masked_squared_error(
            predicted, data.ratings, data.mask, self.weights, self.experiment.objective.average
        )
        result = evaluate_predictions(
            self.schema.names, predicted, data.ratings, data.mask, data.lengths, data.ids,
            self.train.ratings, self.train.mask, self.train.lengths,
        )  # fmt: skip
        return float(total / count), result

    def summary(self, skipped: int) -> dict[str, str]:
        """What a user wants to know before the first step."""
        e, groups = self.experiment, self.train.groups
        packed = packing_statistics(groups, self.plan.epoch(0), e.batch.row_length)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))
        flops = training_flops(e.model, packed.tokens, packed.attention_pairs) / packed.rows * e.batch.rows
        examples = packed.examples / packed.rows * e.batch.rows
        device = self.mesh.devices.flat[0]
        return {
            "parameters": f"{parameters:,}",
            "training examples": f"{packed.examples} of {len(groups)} prompts ({skipped} rows skipped)",
            "validation examples": f"{len(self.validation.ratings)} of {len(self.validation.groups)} prompts",
            "packed rows": f"{packed.rows} of {packed.row_length} tokens, {packed.fill:.1%} filled",
            "tokens": f"{packed.tokens:,} an epoch; {packed.saving:.2f} times as many without shared prompts",
            "steps": f"{self.steps} of {e.batch.rows} rows, about {examples:.1f} examples",
            "mesh": ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
            + f"; {self.mesh.size} {device.device_kind} device(s), {jax.process_count()} process(es)",
            "computation": f"{compute_dtype(e).__name__}, {self.model.compute.attention} attention, "
            f"{flops / 1e12:.3f} TFLOP a step (model FLOPs)",
        }

    def step_flops(self, rows: list[Row]) -> tuple[int, int, float]:
        """Examples, tokens (without padding) and model FLOPs of a step."""
        groups = self.train.groups
        tokens = sum(segment.length for row in rows for segment in row)
        pairs = sum(row_pairs(groups, row) for row in rows)
        examples = sum(len(segment.branches) for row in rows for segment in row)
        return examples, tokens, training_flops(self.experiment.model, tokens, pairs)


def compute_dtype(experiment: Experiment):
    """bfloat16 on accelerators and float32 on a CPU, unless the config says otherwise."""
    name = experiment.compute.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def attention_backend(experiment: Experiment) -> str:
    """The attention that the config names; `auto` by machine and mesh."""
    if experiment.compute.attention != "auto":
        return experiment.compute.attention
    whole_blocks = experiment.batch.row_length % experiment.compute.attention_chunk == 0
    fits = whole_blocks and experiment.mesh.context == 1
    return "blockwise" if jax.default_backend() == "cpu" and fits else "chunked"


def make_model(experiment: Experiment, num_attributes: int) -> RewardModel:
    """The reward model of an experiment."""
    compute, head = experiment.compute, experiment.head
    on_cpu = jax.default_backend() == "cpu"
    return RewardModel(
        config=experiment.model,
        num_attributes=num_attributes,
        readout=head.readout,
        use_bias=head.use_bias,
        compute=Compute(
            dtype=compute_dtype(experiment),
            remat=compute.remat,
            unroll=compute.unroll or (experiment.model.num_layers if on_cpu else 1),
            attention=attention_backend(experiment),
            chunk=compute.attention_chunk,
        ),
    )


def loop(
    run: Run,
    state: TrainState,
    step: int,
    store: CheckpointStore,
    provenance: dict,
    writer: MetricsWriter,
    progress: Progress,
) -> TrainState:
    """Trains from `step` to the end.

    Step k is dispatched before the metrics of step k-1 are read, so that the device never waits for the host.
    """
    e = run.experiment
    pending = None
    clock = time.perf_counter()

    def read(pending) -> None:
        """Waits for a step's metrics, writes them, and stops the run if gradients stay non-finite."""
        nonlocal clock
        done, rows, metrics = pending
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

    with stop_on_sigterm() as stop:
        while step < run.steps:
            rows = run.plan.step_rows(step)
            state, metrics = run.train_step(state, run.feed(rows))
            step += 1
            if pending is not None:
                read(pending)
            pending = (step, rows, metrics)

            last = step == run.steps
            checkpoint = last or is_due(step, e.train.checkpoint_every)
            evaluation = checkpoint or is_due(step, e.train.evaluate_every)
            if evaluation or stop.is_set():
                read(pending)
                pending = None
                loss = evaluate(run, state, step, writer, progress) if evaluation else None
                if checkpoint or stop.is_set():
                    store.save(state.params, training_part(state), step, provenance, loss)
                clock = time.perf_counter()
            if stop.is_set() and not last:
                store.wait()
                raise TrainingError(
                    f"stopped by SIGTERM; step {step} is saved\n  cure: the same command goes on from there"
                )
    return state


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
    names = run.schema.names
    return record | {f"attributes/{n}/mse": float(x) for n, x in zip(names, metrics["squared_error"], strict=True)}


def evaluate(run: Run, state: TrainState, step: int, writer: MetricsWriter, progress: Progress) -> float:
    """Evaluates, writes the record and returns the validation loss."""
    loss, result = run.evaluate(state.params)
    values = {
        f"attributes/{name}/{metric}": value
        for name, metrics in result.metrics.items()
        for metric, value in metrics.items()
        if metric != "count"
    }
    writer.write(step, "validation", {"loss": loss, **values})
    progress.say(f"step {step}: validation loss {loss:.4f}")
    return loss


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


# What a second start may change: the machine, how long and how loudly it trains. All else would not be a resume.
RESUME_MAY_CHANGE = ("mesh", "compute", "train")


def claim_workdir(workdir: Path, experiment: Experiment, *, write: bool) -> None:
    """Writes config.json, or checks that the workdir's run is the same experiment.

    Raises:
        CheckpointError: names the first key that differs.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(json.loads(path.read_text()), json.loads(to_json(experiment)), workdir)
        if write:
            path.write_text(to_json(experiment))
    except OSError as error:
        raise CheckpointError(f"--workdir {workdir}: {error.strerror}; cure: a folder that can be written") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is broken: {error}; cure: another --workdir") from error


def _check_same(old: dict, new: dict, workdir: Path) -> None:
    def differences(old, new, path):
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                yield from differences(old.get(key), new.get(key), f"{path}.{key}")
        elif old != new:
            yield path, old, new

    for group in old.keys() | new.keys():
        if group in RESUME_MAY_CHANGE:
            continue
        for path, before, now in differences(old.get(group), new.get(group), f"config.{group}"):
            raise CheckpointError(
                f"{workdir} holds a run with {path} {before!r}, and now it is {now!r}; "
                "cure: the old value to resume, or another --workdir"
            )
    if old["train"]["seed"] != new["train"]["seed"]:
        raise CheckpointError(f"{workdir} holds a run with another config.train.seed; cure: another --workdir")


def make_provenance(experiment: Experiment, schema: AttributeSchema, tokenizer_hash: str) -> dict:
    """What a checkpoint says about itself (design, decision 13)."""
    data = experiment.data
    return {
        "steerjax": __version__,
        "attributes": schema.to_json(),
        "template": experiment.chat.template,
        "tokenizer": {"source": experiment.chat.tokenizer, "sha256": tokenizer_hash},
        "base_model": "random",
        "data": file_hashes((*data.train, *data.validation)),
        "config": to_dict(experiment),
    }


def summary_text(summary: dict[str, str]) -> str:
    """The summary as lines, names aligned."""
    width = max(map(len, summary))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in summary.items())


def report(run: Run, result: EvaluationResult, workdir: Path, best_step: int | None, skipped: int) -> None:
    """Prints the table and writes report/."""
    print("\n" + format_table(result))
    if best_step is not None and best_step != run.steps:
        print(f"The validation loss was lowest at step {best_step}; that checkpoint is kept too.")
    if run.experiment.train.plots:
        records = read_metrics(workdir / "metrics.jsonl")
        write_report(workdir / "report", result, records, run.summary(skipped), to_json(run.experiment))
        print(f"report with plots: {workdir / 'report' / 'report.md'}")
