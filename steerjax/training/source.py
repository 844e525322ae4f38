"""Where a model's first parameters come from: random numbers, a Hugging Face folder, or another run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from steerjax.bundle.opening import locate_model
from steerjax.bundle.reader import CheckpointReader, is_checkpoint, load_checkpoint
from steerjax.config import Experiment, ModelConfig
from steerjax.errors import ConfigError
from steerjax.hf.config import HuggingFaceConfig, read_config
from steerjax.hf.weights import load_parameters
from steerjax.models.config import LlamaConfig
from steerjax.training.state import init_parameters
from steerjax.training.task import Task


@dataclass(frozen=True)
class Source:
    """An existing model.

    Attributes:
        model: its architecture.
        tokenizer: the folder with its tokenizer.
        attributes: the names that its reward head predicts, in order; () without such a head.
        folder: of its weights.
        config: of a Hugging Face folder.
        checkpoint: of a run.
    """

    model: LlamaConfig
    tokenizer: str
    attributes: tuple[str, ...]
    folder: Path
    config: HuggingFaceConfig | None = None
    checkpoint: CheckpointReader | None = None


def find_source(name: str) -> Source | None:
    """The source that `config.model.source` names; None for `random`.

    Raises:
        ModelError: nothing is there, or nothing that we read.
    """
    if name == "random":
        return None
    folder = locate_model(name)
    if is_checkpoint(folder):
        reader = CheckpointReader(folder)
        saved = reader.provenance
        names = tuple(a["name"] for a in saved["attributes"]) if saved["kind"] == "reward" else ()
        tokenizer = str(folder.resolve().parent.parent / "tokenizer")
        return Source(LlamaConfig.from_json(saved["config"]["model"]), tokenizer, names, folder, checkpoint=reader)
    config = read_config(folder)
    return Source(config.model, str(folder), config.labels, folder, config=config)


def with_source(experiment: Experiment) -> tuple[Experiment, Source | None]:
    """The experiment with the source's architecture and tokenizer filled in, and the source.

    Raises:
        ConfigError: the config sets an architecture that is not the source's, or freezes more layers than there are.
    """
    source = find_source(experiment.model.source)
    model, chat = experiment.model, experiment.chat
    if source is not None:
        untouched = ModelConfig(num_kv_heads=0, head_dim=0)  # what default_config resolves to
        for f in dataclasses.fields(LlamaConfig):
            value, default, found = (getattr(m, f.name) for m in (model, untouched, source.model))
            if value not in (default, found):
                raise ConfigError(
                    f"config.model.{f.name} is {value!r} and {model.source} has {found!r}; "
                    "cure: leave the architecture to the source"
                )
        fields = {f.name: getattr(source.model, f.name) for f in dataclasses.fields(LlamaConfig)}
        most = source.model.num_layers if source.checkpoint is None else 0  # a run of ours is continued whole
        if model.keep_layers > most:
            raise ConfigError(f"config.model.keep_layers is {model.keep_layers}; cure: at most {most} here")
        fields["num_layers"] = model.keep_layers or source.model.num_layers
        model = ModelConfig(**fields, source=model.source, keep_layers=model.keep_layers)
    if chat.tokenizer == "auto":
        chat = dataclasses.replace(chat, tokenizer=source.tokenizer if source else "embedded")
    if experiment.optimizer.frozen_layers > model.num_layers:
        raise ConfigError(
            f"config.optimizer.frozen_layers is {experiment.optimizer.frozen_layers}; "
            f"cure: at most {model.num_layers}, the model's layers"
        )
    return dataclasses.replace(experiment, model=model, chat=chat), source


def initial_parameters(source: Source | None, task: Task, abstract: dict, seed: int) -> tuple[dict, bool]:
    """Whole parameters in the shards of `abstract`, and whether the reward head is new.

    A source's reward head is taken when it predicts the task's attributes, in order.
    """
    if source is None:
        return init_parameters(task.model, task.inputs, abstract, seed), True
    own_head = task.kind == "reward" and source.attributes == task.schema.names
    new = {"reward_head", "reward_bias"} if not own_head else set()
    wanted = {name: tree for name, tree in abstract.items() if name not in new}
    if source.checkpoint is not None:
        params = load_checkpoint(source.checkpoint, wanted)
    else:
        layers = task.model.config.num_layers
        params = load_parameters(source.folder, source.config, wanted, layers)
    rest = {name: tree for name, tree in abstract.items() if name in new}
    if rest:
        params |= init_parameters(task.model, task.inputs, rest, seed)
    return params, not own_head


def rated_attributes(source: Source | None, task: Task) -> list[str] | None:
    """The attributes that a reward head has learned: here, or in the run that it comes from. None for other tasks."""
    if task.kind != "reward":
        return None
    columns = zip(task.schema.names, task.train.mask.any(0), task.weights, strict=True)
    rated = {name for name, present, weight in columns if present and weight}
    if source is not None and source.attributes == task.schema.names:  # its head goes on, see `initial_parameters`
        said = source.checkpoint.provenance.get("rated_attributes") if source.checkpoint else None
        rated |= set(source.attributes if said is None else said)
    return [name for name in task.schema.names if name in rated]
