"""Where a run's first parameters come from: random numbers, or a model of any kind that a bundle can describe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import linen as nn

from steerjax.bundle.build import random_parameters, stored_head, stored_parameters
from steerjax.bundle.describe import describe, output_names
from steerjax.chat.labels import label_tokens
from steerjax.chat.render import Renderer, make_renderer
from steerjax.errors import ConfigError
from steerjax.hf.description import Description
from steerjax.models.config import HeadConfig, LlamaConfig, LoraConfig, ModelConfig
from steerjax.objectives import find_objective, predicted_schema
from steerjax.training.config import Experiment

BASE = r"^(?!reward_)(?!.*/lora_)"  # all but heads and adapters
_MULTIPLE = 128  # of the embedding's rows where tokens are added, so that a mesh can cut them


def resolve_model(experiment: Experiment) -> tuple[Experiment, Description | None, Renderer]:
    """The experiment with what its source and its tokenizer decide filled in, the source, and what renders its texts.

    Raises what `with_source` and `with_vocabulary` do.
    """
    schema = predicted_schema(experiment.objective, experiment.data.make_schema())
    e, source = with_source(experiment)
    renderer = make_renderer(e.chat, schema, source and source.template, find_objective(e.objectives[0]).kind)
    return with_vocabulary(e, renderer, source), source, renderer


def with_source(experiment: Experiment) -> tuple[Experiment, Description | None]:
    """The experiment with the source's architecture and tokenizer filled in, and the source.

    Raises:
        ConfigError: the config sets an architecture that is not the source's, or keeps or freezes more layers than
            there are. ModelError: no such source, or it was trained with another template.
    """
    e, source = experiment, None
    if e.model.source != "random":
        source = describe(e.model.source, template=e.chat.template, verify=e.train.verify)
        e = dataclasses.replace(e, model=_with_architecture(e.model, source.model))
    e = with_frozen_base(e)
    if e.chat.tokenizer == "auto":
        tokenizer = str(source.tokenizer.files[0]) if source else "embedded"
        e = dataclasses.replace(e, chat=dataclasses.replace(e.chat, tokenizer=tokenizer))
    if e.optimizer.frozen_layers > e.model.num_layers:
        raise ConfigError(
            f"config.optimizer.frozen_layers is {e.optimizer.frozen_layers}; "
            f"cure: at most {e.model.num_layers}, the model's layers"
        )
    return e, source


def with_frozen_base(e: Experiment) -> Experiment:
    """With adapters, only they and heads are trained."""
    if not e.model.lora.rank or BASE in e.optimizer.frozen:
        return e
    return dataclasses.replace(e, optimizer=dataclasses.replace(e.optimizer, frozen=(*e.optimizer.frozen, BASE)))


def with_base_dtype(abstract: dict, lora: LoraConfig) -> dict:
    """Abstract parameters as they are kept: what adapters leave alone may be bfloat16."""
    if not lora.rank:
        return abstract

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.ShapeDtypeStruct(x.shape, lora.base_dtype if re.search(BASE, name) else x.dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _with_architecture(config: ModelConfig, found: LlamaConfig) -> ModelConfig:
    untouched = ModelConfig(num_kv_heads=0, head_dim=0)  # what default_config resolves to
    for f in dataclasses.fields(LlamaConfig):
        value, default, theirs = (getattr(m, f.name) for m in (config, untouched, found))
        if value not in (default, theirs) and (f.name != "lora" or theirs != default):
            raise ConfigError(
                f"config.model.{f.name} is {value!r} and {config.source} has {theirs!r}; "
                "cure: leave the architecture to the source"
            )
    if config.keep_layers > found.num_layers:
        raise ConfigError(f"config.model.keep_layers is {config.keep_layers}; cure: at most {found.num_layers} here")
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(LlamaConfig)}
    fields["num_layers"] = config.keep_layers or found.num_layers
    fields["lora"] = found.lora if found.lora.rank else config.lora
    return ModelConfig(**fields, source=config.source, keep_layers=config.keep_layers)


def new_tokens(renderer: Renderer, source: Description | None) -> dict[int, tuple[int, ...]]:
    """The tokens of the label line that the source has not, each with the source's tokens of `helpfulness:4`."""
    tokens = label_tokens(renderer.schema, renderer.template.labels)
    ids = {token: renderer.tokenizer.token_id(token) for token in tokens}
    if source is None:
        return {index: () for index in ids.values() if index is not None}
    theirs = source.tokenizer
    return {
        index: tuple(theirs.encode(token[1:-1], continuation=True))
        for token, index in ids.items()
        if index is not None and theirs.token_id(token) is None
    }


def with_vocabulary(experiment: Experiment, renderer: Renderer, source: Description | None) -> Experiment:
    """The vocabulary size 0 becomes the tokenizer's, and the source's grows where the label line has `new_tokens`.

    Raises:
        ConfigError: ids could lie outside the embedding, or have another meaning in it, or learn nothing.
    """
    tokenizer, new = renderer.tokenizer, new_tokens(renderer, source)
    theirs, ours = ((t.backend.get_vocab() if t else {}) for t in (source and source.tokenizer, tokenizer))
    strings = {index: string for string, index in theirs.items()}
    if wrong := [string for string, index in ours.items() if strings.get(index, string) != string]:
        raise ConfigError(
            f"config.chat.tokenizer {experiment.chat.tokenizer}: {len(wrong)} of its ids, that of {min(wrong)!r} for "
            f"one, are other tokens in {experiment.model.source}; cure: 'auto' takes the model's own"
        )
    _check_trained(experiment, len(new))
    needed = -(-tokenizer.vocab_size // _MULTIPLE) * _MULTIPLE if new else tokenizer.vocab_size
    size = experiment.model.vocab_size or needed
    if source and {index for string, index in ours.items() if string not in theirs} <= new.keys():
        size = max(size, needed)
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"config.model.vocab_size {size} is less than the tokenizer's {tokenizer.vocab_size}; "
            "cure: 0 takes the tokenizer's; a pretrained model wants the tokenizer it came with"
        )
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=size))


def _check_trained(e: Experiment, new: int) -> None:
    """Raises ConfigError: tokens are new, and the embedding is frozen."""
    frozen = {
        "model.lora.rank": e.model.lora.rank,
        "optimizer.frozen_layers": e.optimizer.frozen_layers,
        "optimizer.frozen": any(re.search(pattern, "llama/embedding") for pattern in e.optimizer.frozen),
    }
    for key, there in frozen.items():
        if new and there:
            raise ConfigError(
                f"config.chat.labels 'tokens': {new} tokens are new to {e.model.source}, and they learn nothing, as "
                f"with config.{key} the embedding is frozen; cure: leave that out, or labels 'numbers' or 'words'"
            )


def split(tree: dict, chosen: Callable[[str], bool]) -> tuple[dict, dict]:
    """A nested dict without the leaves whose names are chosen, and those alone."""
    rest, found = {}, {}
    for name, part in tree.items():
        if isinstance(part, dict):
            rest[name], inner = split(part, chosen)
            found |= {name: inner} if inner else {}
        else:
            (found if chosen(name) else rest)[name] = part
    return rest, found


def merged(one: dict, other: dict) -> dict:
    """Both nested dicts' leaves."""
    return one | {name: merged(one.get(name, {}), p) if isinstance(p, dict) else p for name, p in other.items()}


def initial_parameters(
    source: Description | None,
    module: nn.Module,
    whole: dict,
    names: tuple[str, ...],
    seed: int,
    tokens: Mapping[int, Sequence[int]] | None = None,
) -> tuple[dict, bool]:
    """Whole parameters in the shards of `whole`, and whether they have a new reward head.

    A source's head is taken when it predicts `names`, in order. `tokens`: as `new_tokens`.

    Raises:
        ConfigError: that head is read in another way, or has a bias and this model none, or the reverse.
    """
    if source is None and module.config.lora.rank:
        raise ConfigError("config.model.lora adapts a model that is there; cure: a config.model.source, or rank 0")
    if source is None:
        return random_parameters(module, whole, seed), "reward_head" in whole
    head = [name for name in ("reward_head", "reward_bias") if name in whole]
    new = head if output_names(source) != names else []
    if head and not new:
        theirs = stored_head(source)
        if theirs != HeadConfig(module.readout, module.use_bias):
            raise ConfigError(
                f"config.head is not that of {source.path}; cure: config.head.readout='{theirs.readout}' and "
                f"config.head.use_bias={theirs.use_bias}, as its head goes on"
            )
    wanted = {name: tree for name, tree in whole.items() if name not in new}
    made = {name: whole[name] for name in new}
    if module.config.lora.rank and not source.model.lora.rank:  # new adapters
        wanted, adapters = split(wanted, lambda name: name.startswith("lora_"))
        made |= adapters
    params = stored_parameters(source, wanted, tokens)
    return merged(params, random_parameters(module, made, seed)) if made else params, bool(new)
