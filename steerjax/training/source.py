"""Where a run's first parameters come from: random numbers, or a model of any kind that a bundle can describe."""

from __future__ import annotations

import dataclasses

from flax import linen as nn

from steerjax.bundle.build import random_parameters, stored_parameters
from steerjax.bundle.describe import describe
from steerjax.bundle.reader import is_checkpoint
from steerjax.chat.tokenizer import Tokenizer
from steerjax.errors import ConfigError
from steerjax.hf.config_json import read_config
from steerjax.hf.description import Description
from steerjax.models.config import LlamaConfig, ModelConfig
from steerjax.training.config import Experiment


def with_source(experiment: Experiment) -> tuple[Experiment, Description | None]:
    """The experiment with the source's architecture and tokenizer filled in, and the source.

    Raises:
        ConfigError: the config sets an architecture that is not the source's, or keeps or freezes more layers than
            there are. ModelError: no such source, or it was trained with another template.
    """
    e, source = experiment, None
    if e.model.source != "random":
        source = describe(e.model.source, template=e.chat.template)
        e = dataclasses.replace(e, model=_with_architecture(e.model, source.model))
    if e.chat.tokenizer == "auto":
        e = dataclasses.replace(e, chat=dataclasses.replace(e.chat, tokenizer=_tokenizer_of(source)))
    if e.optimizer.frozen_layers > e.model.num_layers:
        raise ConfigError(
            f"config.optimizer.frozen_layers is {e.optimizer.frozen_layers}; "
            f"cure: at most {e.model.num_layers}, the model's layers"
        )
    return e, source


def _with_architecture(config: ModelConfig, found: LlamaConfig) -> ModelConfig:
    untouched = ModelConfig(num_kv_heads=0, head_dim=0)  # what default_config resolves to
    for f in dataclasses.fields(LlamaConfig):
        value, default, theirs = (getattr(m, f.name) for m in (config, untouched, found))
        if value not in (default, theirs):
            raise ConfigError(
                f"config.model.{f.name} is {value!r} and {config.source} has {theirs!r}; "
                "cure: leave the architecture to the source"
            )
    if config.keep_layers > found.num_layers:
        raise ConfigError(f"config.model.keep_layers is {config.keep_layers}; cure: at most {found.num_layers} here")
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(LlamaConfig)}
    fields["num_layers"] = config.keep_layers or found.num_layers
    return ModelConfig(**fields, source=config.source, keep_layers=config.keep_layers)


def _tokenizer_of(source: Description | None) -> str:
    if source is None:
        return "embedded"
    return str(source.path.absolute().parent.parent / "tokenizer" if is_checkpoint(source.path) else source.path)


def with_vocabulary(experiment: Experiment, tokenizer: Tokenizer) -> Experiment:
    """The vocabulary size 0 becomes the tokenizer's.

    Raises:
        ConfigError: ids could lie outside the embedding.
    """
    size = experiment.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"config.model.vocab_size {size} is less than the tokenizer's {tokenizer.vocab_size}; "
            "cure: 0 takes the tokenizer's; a pretrained model wants the tokenizer it came with"
        )
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=size))


def predicted_by(source: Description | None) -> tuple[str, ...]:
    """The names that a source's reward head predicts, in order; () without such a head."""
    if source is None or source.kind != "reward":
        return ()
    return source.schema.names if source.schema else read_config(source.path).labels


def initial_parameters(
    source: Description | None, module: nn.Module, whole: dict, names: tuple[str, ...], seed: int
) -> tuple[dict, bool]:
    """Whole parameters in the shards of `whole`, and whether they have a new reward head.

    A source's head is taken when it predicts `names`, in order.
    """
    if source is None:
        return random_parameters(module, whole, seed), "reward_head" in whole
    new = [name for name in ("reward_head", "reward_bias") if name in whole and predicted_by(source) != names]
    params = stored_parameters(source, {name: tree for name, tree in whole.items() if name not in new})
    if new:
        params |= random_parameters(module, {name: whole[name] for name in new}, seed)
    return params, bool(new)
