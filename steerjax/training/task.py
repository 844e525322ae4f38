"""What the loop asks of a task, and what all tasks need to run a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from steerjax.config import Experiment
from steerjax.data.batch import BatchPlan
from steerjax.data.loading import Skipped
from steerjax.errors import ConfigError
from steerjax.models.attention.backends import Choice, choose, unfit
from steerjax.models.llama import Compute
from steerjax.training.input import Feeder


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: the training objective on the validation split.
        values: what goes into metrics.jsonl, by name.
        detail: what the task's report needs.
    """

    loss: float
    values: Mapping[str, float | None]
    detail: Any


class Task(Protocol):
    """Data, model and loss: everything that a reward model and a chat model do differently.

    Attributes:
        kind: "reward" or "chat".
        model: the Linen module that is trained.
        inputs: arguments of the model, one token each, for its initialisation.
        frozen: regular expressions over the names of parameters that are not trained.
        plan: the rows of each step.
        feed: rows -> batch.
        evaluation_rows: a step of evaluation.
        skipped: rows that were left out.
    """

    kind: str
    model: nn.Module
    inputs: tuple
    frozen: tuple[str, ...]
    plan: BatchPlan
    feed: Feeder
    evaluation_rows: int
    skipped: list[Skipped]

    @property
    def loss(self) -> Callable[[Any, Any], tuple[jax.Array, tuple[jax.Array, Mapping]]]:
        """(params, batch) -> (sum, (count, {name: (sum, count)})), all float32."""

    def begin(self, params, batch, new_head: bool):
        """Parameters before the first step; traced. `new_head`: the head is random, not the source's."""

    def evaluation_step(self, params, batch):
        """What an evaluation needs of a batch; traced."""

    def evaluate(self, step, params) -> Evaluation:
        """On the validation split. `step` is the compiled `evaluation_step`."""

    def log_values(self, metrics: Mapping) -> dict[str, float]:
        """A step's metrics as numbers for metrics.jsonl."""

    def summary(self) -> dict[str, str]:
        """Facts of the data, for the summary."""

    def head_outputs(self, tokens: int, examples: int) -> float:
        """Outputs of the head a token, for the FLOP count."""

    def report(self, evaluation: Evaluation, folder: Path | None, records, summary, config_text: str) -> str:
        """Writes the report into the folder, if there is one; returns what is printed."""


def compute_dtype(experiment: Experiment, platform: str | None = None):
    """bfloat16 on accelerators and float32 on a CPU, unless the config says otherwise."""
    name = experiment.compute.dtype
    if name == "auto":
        name = "float32" if _on_cpu(platform) else "bfloat16"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def attention_backend(experiment: Experiment, platform: str | None = None) -> Choice:
    """The attention that the config names; `auto` by machine, lengths and mesh, with the reason.

    Raises:
        ConfigError: the config names one that cannot run this.
    """
    e, platform = experiment, platform or jax.default_backend()
    dtype, chunk = compute_dtype(e, platform).__name__, e.compute.attention_chunk
    facts = (platform, dtype, e.model.head_dim, e.batch.row_length, chunk, e.mesh.context)
    name = e.compute.attention
    if name == "auto":
        return choose(*facts)
    if problem := unfit(name, *facts):
        raise ConfigError(f"config.compute.attention is '{name}': {problem}; cure: change that, or 'auto'")
    return Choice(name, "named in the config")


def make_compute(experiment: Experiment, platform: str | None = None) -> Compute:
    """How an experiment's model is run.

    Args:
        platform: of the devices that will run it (`cpu`, `tpu`, ...); this machine's by default. A plan compiles for
            another machine.
    """
    compute = experiment.compute
    return Compute(
        dtype=compute_dtype(experiment, platform),
        remat=compute.remat,
        unroll=compute.unroll or (experiment.model.num_layers if _on_cpu(platform) else 1),
        attention=attention_backend(experiment, platform).name,
        chunk=compute.attention_chunk,
    )


def _on_cpu(platform: str | None) -> bool:
    return (platform or jax.default_backend()) == "cpu"
