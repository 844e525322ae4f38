"""The config groups of training, and the whole experiment."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, Field

from steerjax.chat.render import ChatConfig
from steerjax.data.config import BatchConfig, DataConfig
from steerjax.models.config import ComputeConfig, HeadConfig, ModelConfig
from steerjax.parallel.mesh import MeshConfig
from steerjax.training.trackers import TRACKERS
from steerjax.typed import STRICT, Count, NotNegative, Positive, PositiveFloat, separated

Beta = Annotated[float, Field(ge=0, lt=1)]
TrackerNames = Annotated[tuple[Literal[*TRACKERS], ...], BeforeValidator(separated), Field(strict=False)]


@AfterValidator
def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression ({error}); cure: correct it, or escape it with a backslash") from None
    return text


Patterns = Annotated[tuple[Annotated[str, _pattern], ...], BeforeValidator(separated), Field(strict=False)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW and the learning rate.

    Attributes:
        schedule: after the warm-up: `constant`, or NeMo-Aligner's `cosine` from learning_rate to min_learning_rate.
        constant_steps: `cosine` only: how many steps at the end are at min_learning_rate.
        clip_norm: greatest global norm of the gradients; 0 does not clip.
        weight_decay: of matrices; norms and biases are left alone.
        first_moment_dtype: of Adam's mean of gradients; bfloat16 saves 2 bytes a trained parameter. The mean of squares
            stays float32.
        max_bad_steps: the run ends after this many steps in a row whose gradients are not finite.
        frozen: regular expressions; a parameter whose name (`llama/embedding`, `llama/layers/mlp/up/kernel`, ...) one
            of them is found in is not trained, and has neither gradient nor optimizer state.
        frozen_layers: the embedding and this many of the first layers are not trained either, and nothing is
            propagated back through them; 0 freezes neither.
    """

    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 1e-3  # the highest of the schedule
    min_learning_rate: NotNegative = 0.0  # where `cosine` ends
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Count = 10  # steps in which the rate rises from 0 to learning_rate
    constant_steps: Count = 0
    weight_decay: NotNegative = 0.1
    beta1: Beta = 0.9  # decay of Adam's mean of the gradients
    beta2: Beta = 0.98  # decay of Adam's mean of their squares
    epsilon: PositiveFloat = 1e-8  # added to the root of the mean of squares
    clip_norm: NotNegative = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    max_bad_steps: Positive = 5
    frozen: Patterns = ()
    frozen_layers: Annotated[int, Field(ge=0, le=10_000)] = 0

    def __post_init__(self):
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is more than learning_rate; cure: at most learning_rate")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How long a run is, and what it writes on the way.

    Attributes:
        epochs: passes over the training data; `steps`, where it is not 0, takes its place.
        seed: of new parameters and of the order of the rows.
        log_every: steps between two lines of the log; 0 is 1.
        evaluate_every: steps between two validations; 0 is only at the end, and before each checkpoint.
        checkpoint_every: steps between two checkpoints; 0 is only at the end.
        keep_last: how many of the newest checkpoints are kept; the best by validation loss is kept beside them.
        plots: draw the report's plots (needs matplotlib).
        trackers: where the figures also go; `wandb` is Weights & Biases (needs the extra `wandb`).
        accept_changes: resume although data, tokenizer or source model have changed; checkpoints record it.
        verify: compare checkpoint and source model with their checksums when they are opened.
    """

    epochs: Annotated[float, Field(ge=0, le=1_000_000)] = 1.0
    steps: Count = 0  # length of the run; 0 follows from epochs
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Count = 1
    evaluate_every: Count = 0
    checkpoint_every: Count = 0
    keep_last: Positive = 2
    plots: bool = True
    trackers: TrackerNames = ("tensorboard",)
    accept_changes: bool = False
    verify: bool = True

    def __post_init__(self):
        if not self.steps and not self.epochs:
            raise ValueError("nothing to train; cure: epochs or steps above 0")


@dataclass(frozen=True)
class Experiment:
    """A whole run. `steerjax train --config FILE`.

    Attributes:
        objectives: what is learnt, by name; their losses are added up.
        objective: the config group of each of them, by name.
    """

    objectives: tuple[str, ...]
    objective: Mapping[str, Any]
    data: DataConfig
    chat: ChatConfig
    model: ModelConfig
    head: HeadConfig
    compute: ComputeConfig
    mesh: MeshConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    train: TrainConfig

    def sources(self) -> tuple[str, ...]:
        """All data that is read, each once."""
        read = [own if own.train else self.data for own in self.objective.values()]
        return tuple(dict.fromkeys(source for each in read for source in (*each.train, *each.validation)))

    def to_dict(self) -> dict:
        """Nested plain data as a recipe writes it: objectives' groups stand beside the others."""
        values = dataclasses.asdict(self)
        return values | values.pop("objective")

    def to_json(self) -> str:
        """The resolved experiment as `config.json` has it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


GROUPS: dict[str, type] = {
    "data": DataConfig, "chat": ChatConfig, "model": ModelConfig, "head": HeadConfig, "compute": ComputeConfig,
    "mesh": MeshConfig, "batch": BatchConfig, "optimizer": OptimizerConfig, "train": TrainConfig,
}  # fmt: skip
