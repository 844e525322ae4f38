"""Where a model's first parameters come from: random numbers, a Hugging Face folder, or another run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from steerjax.checkpoints.opening import locate_model
from steerjax.checkpoints.reader import CheckpointReader, is_checkpoint
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
        tokenizer = str(folder.absolute().parent.parent / "tokenizer")
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
        for f in dataclasses.fields(LlamaConfig):
            value, default, found = (getattr(m, f.name) for m in (model, ModelConfig(), source.model))
            if value not in (default, found):
                raise ConfigError(
                    f"config.model.{f.name} is {value!r} and {model.source} has {found!r}; "
                    "cure: leave the architecture to the source"
                )
        fields = {f.name: getattr(source.model, f.name) for f in dataclasses.fields(LlamaConfig)}
        model = ModelConfig(**fields, source=model.source)
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
        params = _read_checkpoint(source.checkpoint, wanted)
    else:
        params = load_parameters(source.folder, source.config, wanted)
    rest = {name: tree for name, tree in abstract.items() if name in new}
    if rest:
        params |= init_parameters(task.model, task.inputs, rest, seed)
    return params, not own_head


def _read_checkpoint(reader: CheckpointReader, wanted: dict) -> dict:
    """A run's parameters in the shards of `wanted`, which may freeze another number of layers than the run did."""
    stacks = {"llama/frozen_layers": 0, "llama/layers": 0}  # stack -> its first layer, in the checkpoint and wanted
    theirs = stacks | {"llama/layers": reader.shapes.get("llama/frozen_layers/attention_norm/scale", (0,))[0]}
    frozen = wanted["llama"].get("frozen_layers")
    ours = stacks | {"llama/layers": frozen["attention_norm"]["scale"].shape[0] if frozen else 0}

    def leaf(path, spec: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stack = next((s for s in stacks if name.startswith(s + "/")), None)

        def read(index):
            if stack is None:
                return reader.read(name, index)
            tail, first = name.removeprefix(stack), ours[stack]
            layers = range(*index[0].indices(spec.shape[0]))
            parts = []
            for layer in (first + i for i in layers):
                source = "llama/frozen_layers" if layer < theirs["llama/layers"] else "llama/layers"
                place = layer - theirs[source]
                parts.append(reader.read(source + tail, (slice(place, place + 1), *index[1:])))
            return np.concatenate(parts)

        return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: read(index).astype(spec.dtype))

    return jax.tree_util.tree_map_with_path(leaf, wanted)
