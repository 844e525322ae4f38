"""What all objectives have in common: the questions that input, step and report ask of one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pydantic.dataclasses
from flax import linen as nn

from steerjax.chat.render import Renderer
from steerjax.data.batch import Batch
from steerjax.data.config import Format, Texts
from steerjax.data.conversation import Conversation
from steerjax.data.packing import Layout, check_fits
from steerjax.data.trees import Example
from steerjax.errors import ConfigError, DataError
from steerjax.report.records import own_losses
from steerjax.schema import Attribute, Schema, check_rating
from steerjax.typed import STRICT, NotNegative

TRAIN, VALIDATION = "train", "validation"
Sums = Mapping[str, tuple[jax.Array, jax.Array]]  # metric -> (sum, count), float32


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """What every objective's config group has.

    Attributes:
        weight: the factor of this loss in the sum of all objectives' losses.
        train, validation, format: data of this objective, as in `config.data`; without `train` it learns from
            `config.data`.
    """

    weight: NotNegative = 1.0
    train: Texts = ()
    validation: Texts = ()
    format: Format = "auto"

    def __post_init__(self):
        if not self.train and (self.validation or self.format != "auto"):
            raise ValueError("validation or format without train; cure: set train too, or neither")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class SteeredConfig(ObjectiveConfig):
    """Of an objective whose responses stand after label lines.

    Attributes:
        default_ratings: attribute -> rating that an exported model is asked for where a request does not name it.
    """

    group: ClassVar[str]  # its name in the config
    default_ratings: Mapping[str, float] = field(default_factory=dict)

    def check(self, schema: Schema) -> None:
        """Raises ConfigError: a default rating of an unknown attribute, or outside its range."""
        for name, rating in self.default_ratings.items():
            try:
                check_rating(rating, schema[name])
            except DataError as error:
                raise ConfigError(f"config.{self.group}.default_ratings: {error}") from None

    def facts(self) -> dict:
        return {"default_ratings": dict(self.default_ratings)} if self.default_ratings else {}


@dataclass(frozen=True)
class Setting:
    """What an objective is given beside its config group."""

    schema: Schema
    renderer: Renderer
    loss_chunk: int = 256  # tokens of a row whose logits are held at a time
    row_length: int = 2**30  # tokens
    positions: int = 2**30  # that the model can tell apart

    def check_length(self, tokens: int) -> None:
        """Raises DataError when an example is too long for a row of its own, or for the model."""
        check_fits(tokens, self.row_length)
        if tokens > self.positions:
            cure = "shorten the row, or set config.data.on_bad_row='skip' to leave such rows out"
            raise DataError(f"{tokens} tokens, and model.max_position_embeddings is {self.positions}", cure=cure)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation on the validation split found."""

    loss: float
    values: Mapping[str, float | None]  # for metrics.jsonl, by name
    detail: Any = None  # what the objective's report needs


class Objective:
    """One thing that a model learns. Subclasses say what is rendered, what is learnt where, loss, metrics and report.

    B rows of T tokens. `model` is a bound module, `hidden` its hidden states [B T D], `batch` what they come from, and
    the argument `arrays` what the method `arrays` added to it.

    Attributes:
        name: of the objective and of its config group.
        kind: of the model, "reward" (a head that reads ratings) or "chat" (a language model).
        Config: the config group, an `ObjectiveConfig` with `check(schema)`.
        sampled: whether it learns from rows of sampled responses (`Conversation.samples`), or from all others.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    Config: ClassVar[type]
    sampled: ClassVar[bool] = False

    def __init__(self, config, setting: Setting):
        self.config, self.setting = config, setting

    @staticmethod
    def predicts(config: Any, schema: Schema) -> tuple[Attribute, ...]:
        """What the objective needs a reward head for, of the data's attributes or of its own."""
        return schema.attributes

    def check_row(self, conversation: Conversation) -> None:
        """Raises DataError: a row of sampled responses where others are learnt from, or the reverse."""
        if self.sampled and not conversation.samples:
            cure = "rows of the format steerlm2, which has responses with log-probabilities (docs/steerlm2.md)"
            raise DataError(f"no sampled responses, which config.objectives '{self.name}' learns from", cure=cure)
        if conversation.samples and not self.sampled:
            cure = "config.objectives=('steerlm2',), or another file"
            raise DataError(f"sampled responses, which config.objectives '{self.name}' does not read", cure=cure)

    def examples(self, conversation: Conversation, split: str) -> list[Example]:
        """What of a conversation is learnt, in tokens; [] where there is nothing.

        The objective keeps what it needs of the data, split (TRAIN or VALIDATION) by split.

        Raises:
            DataError: the conversation cannot be used (`Setting.check_length`); nothing of it has been kept.
        """
        raise NotImplementedError

    def check_data(self) -> None:
        """Called when all conversations are read. Raises DataError where training on them would be wrong."""

    def arrays(self, layout: Layout) -> dict[str, np.ndarray]:
        """What the objective adds to a row; arrays whose first dimension is T are cut as tokens are."""
        raise NotImplementedError

    def count(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """What the loss's sum is divided by; of any number of rows, from the batch alone."""
        raise NotImplementedError

    def loss(self, model: nn.Module, hidden: jax.Array, batch: Batch, arrays) -> tuple[jax.Array, Sums]:
        """The sum over the rows, and sums and counts of metrics, all float32."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, hidden: jax.Array, batch: Batch, arrays):
        """What an evaluation needs of a batch; traced."""
        raise NotImplementedError

    def evaluate(self, steps: Sequence[tuple[list[Layout], Any]]) -> Evaluation:
        """From each step's rows, as they were laid out, and its `outputs` (of padding rows too)."""
        raise NotImplementedError

    def read_ends(self, steps: Sequence[tuple[list[Layout], Any]]) -> Iterator[tuple[Example, Any]]:
        """Of `evaluate`'s steps: each example of this objective with its rows' output at its last token."""
        for layout, output in (row for step in steps for row in zip(*step, strict=True)):
            for example, place in layout.ends:
                if example.objective == self.name:
                    yield example, output[place]

    def first_sums(self, model: nn.Module, hidden: jax.Array, batch: Batch, arrays):
        """For a new head: what `first_parameters` needs of the first step, added up over its rows; None for nothing."""
        return None

    def first_parameters(self, params: Mapping, sums) -> dict:
        """A new head's parameters before the first step, by their top-level names."""
        return {}

    def facts(self) -> dict:
        """What a checkpoint says of the objective: fields of `Provenance`."""
        return {}

    def summary(self) -> dict[str, str]:
        """Facts of the data, for the summary."""
        return {}

    def losses(self, records: Sequence[Mapping]) -> dict[str, np.ndarray]:
        """The objective's own loss, without its weight, from metrics.jsonl: split -> steps and losses [n, 2]."""
        return own_losses(records, self.name, self.config.weight) if records else {}

    def report(self, evaluation: Evaluation, folder: Path | None, records, summary, config_text: str) -> str:
        """Writes the report into the folder, if there is one; returns what is printed."""
        raise NotImplementedError
