"""A config file's ConfigDict -> a frozen experiment, checked before anything is compiled.

A recipe (`configs/*.py`) starts from `default_config()`, changes what it wants and returns the ConfigDict;
`resolve` turns it into an `Experiment`. Inner code takes these values as they are and checks nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from steerjax.errors import ConfigError
from steerjax.models.config import LlamaConfig
from steerjax.schema import SCHEMAS


@dataclass(frozen=True)
class ModelConfig(LlamaConfig):
    """The Llama that is trained.

    Attributes:
        source: where its parameters come from: `random`, a Hugging Face folder, a hub id, or a run of ours. With a
            source the architecture is the source's, and all other keys of this group stay at their defaults.
        keep_layers: so many of the source's first layers, and the rest is left out; 0 keeps all. The middle layers of
            a small model can predict ratings better than the last, which are about the next token.
    """

    source: str = "random"
    keep_layers: int = 0


@dataclass(frozen=True)
class DataConfig:
    """What is read, and what happens to rows that cannot be used.

    Attributes:
        train, validation: files (.jsonl, .json, .csv, .parquet, plain or .gz), `hub:OWNER/NAME[:SPLIT]`, or
            `embedded:helpsteer`. Without validation sources, a part of the train prompts is held out.
        validation_fraction: of the prompts.
        format: of the rows; see docs/formats.md. `auto` goes by the keys.
        schema: helpsteer (5 attributes), oasst (4) or steerlm (9).
        on_bad_row: stop at the first bad row, or skip them, count them and list them in skipped.jsonl.
        on_duplicate: what a row that stands twice is. HelpSteer has such rows by design: two samples of one model
            can be the same text.
        control_strings: refuse rows whose text contains a control string of the template, or escape them.
        split_seed: of the hold-out; apart from `train.seed`, so that runs share their validation rows.
    """

    train: tuple[str, ...] = ("embedded:helpsteer",)
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.15
    format: Literal[
        "auto", "helpsteer", "regression", "reference", "conversation", "messages", "sharegpt", "alpaca"
    ] = "auto"
    schema: str = "helpsteer"
    on_bad_row: Literal["error", "skip"] = "error"
    on_duplicate: Literal["error", "keep", "skip"] = "error"
    control_strings: Literal["refuse", "escape"] = "refuse"
    split_seed: int = 0


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation becomes tokens.

    Attributes:
        tokenizer: `embedded`, a SentencePiece .model, a tokenizer.json, or a folder with one of them; `auto` is the
            model source's own, and the embedded one for a random model.
        template: extra_id, chatml, llama3 or llama2.
        system_prompt: for conversations without one; "default" is the template's own.
    """

    tokenizer: str = "auto"
    template: Literal["extra_id", "chatml", "llama3", "llama2"] = "extra_id"
    system_prompt: str = "default"


@dataclass(frozen=True)
class HeadConfig:
    """The reward head.

    Attributes:
        readout: state at the response's last token, or mean over prompt and response.
        use_bias: off by default, as no stock server loads a bias.
    """

    readout: Literal["last", "mean"] = "last"
    use_bias: bool = False


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is run; changes speed and memory, not the model.

    Attributes:
        dtype: of the computation; parameters and optimizer state are float32. `auto` is bfloat16 on accelerators and
            float32 on CPU.
        remat: what a layer keeps for its backward pass: all (`none`), matrix products (`dots`), nothing (`full`).
        unroll: layers a step of the scan over layers; 0 is all of them on a CPU and 1 elsewhere.
        attention: `blockwise` (skips all that the mask forbids), `splash` (the same on TPU, by a kernel), `cudnn` (GPU,
            by a kernel) or `chunked` (dense, skips the future); all are the same function. `auto` takes blockwise on
            CPU, splash on TPU and cudnn on GPU where they fit, else chunked, and a run's summary says why.
        attention_chunk: queries a chunk (chunked) or block (blockwise) of the attention, in tokens.
        loss_chunk: tokens of a row whose logits are held at a time (SFT).
        cache_frozen: run the frozen layers once over all data and keep their outputs in memory (reward models; needs
            optimizer.frozen_layers).
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 0
    attention: Literal["auto", "chunked", "blockwise", "splash", "cudnn"] = "auto"
    attention_chunk: int = 256
    loss_chunk: int = 256
    cache_frozen: bool = False


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, "all that are left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclass(frozen=True)
class BatchConfig:
    """Packed rows.

    Attributes:
        rows: a step, over all devices.
        row_length: tokens a row.
        micro_batches: parts a step is computed in, one after the other; the result is the same, the memory less.
        responses_per_row: most responses in a row; 0 is row_length / 32.
        evaluation_rows: a step of evaluation; 0 is rows / micro_batches.
    """

    rows: int = 8
    row_length: int = 2048
    micro_batches: int = 1
    responses_per_row: int = 0
    evaluation_rows: int = 0


@dataclass(frozen=True)
class ObjectiveConfig:
    """Masked mean squared error.

    Attributes:
        average: over all ratings of a step, or over examples, each the mean of its own ratings (NeMo-Aligner with
            micro-batch 1).
        attribute_weights: by name; attributes that are not named weigh 1.
    """

    average: Literal["ratings", "examples"] = "ratings"
    attribute_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SFTConfig:
    """Attribute-conditioned SFT.

    Attributes:
        ratings: which ratings the label lines carry; `none` is plain SFT.
        missing: a response without ratings is trained without a label line (omit), is context only (leave_out), or
            stops the run (error).
        default_ratings: what an exported model is asked for where a request names nothing; by name.
    """

    ratings: Literal["human", "predicted", "human_then_predicted", "none"] = "human"
    missing: Literal["omit", "leave_out", "error"] = "omit"
    default_ratings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning rate.

    Attributes:
        schedule: `constant` after the warm-up, or the reference's `cosine` from learning_rate to min_learning_rate.
        constant_steps: `cosine` only: steps at min_learning_rate at the end.
        clip_norm: greatest global norm of the gradients; 0 does not clip.
        weight_decay: of matrices; norms and biases are left alone.
        first_moment_dtype: of Adam's mean of gradients; bfloat16 saves 2 bytes a trained parameter. The mean of squares
            stays float32.
        max_bad_steps: so many steps in a row with gradients that are not finite end the run.
        frozen: regular expressions over parameter names (`llama/embedding`, `llama/layers/mlp/up/kernel`, ...); what
            one is found in is not trained and has no gradient and no optimizer state.
        frozen_layers: so many of the first layers, and the embedding, are not trained either, and nothing is
            propagated back through them.
    """

    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 10
    constant_steps: int = 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    max_bad_steps: int = 5
    frozen: tuple[str, ...] = ()
    frozen_layers: int = 0

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Regular expressions over the names of all parameters that are not trained."""
        return self.frozen + (("llama/embedding", "llama/frozen_layers") if self.frozen_layers else ())


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
        epochs: over the training rows; `steps`, where it is not 0, counts instead.
        seed: of the parameters and of the order of the rows.
        log_every, evaluate_every, checkpoint_every: in steps; 0 is only at the end. A checkpoint is evaluated first.
        keep_last: newest checkpoints that are kept; the best by validation loss is kept beside them.
        plots: draw the report's plots (needs matplotlib).
    """

    epochs: float = 1.0
    steps: int = 0
    seed: int = 0
    log_every: int = 1
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep_last: int = 2
    plots: bool = True


@dataclass(frozen=True)
class Experiment:
    """A whole run. `python -m steerjax.train --config FILE`.

    Attributes:
        task: `reward` trains a reward model (head, objective), `sft` a chat model conditioned on ratings (sft).
    """

    task: Literal["reward", "sft"] = "reward"
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = HeadConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()


def default_config():
    """Every key at its default, as the ConfigDict that a recipe changes (an unknown key is an error there too)."""
    from ml_collections import ConfigDict

    config = ConfigDict(to_dict(Experiment()))
    config.model.update(num_kv_heads=0, head_dim=0)  # follow from num_heads and hidden_size, whatever a recipe sets
    return config


def to_dict(value) -> dict:
    """Nested plain data (tuples stay tuples) of a frozen config."""
    return dataclasses.asdict(value)


def to_json(experiment: Experiment) -> str:
    """The resolved experiment as `config.json` has it."""
    return json.dumps(to_dict(experiment), indent=2) + "\n"


def parse_mesh(text: str) -> MeshConfig:
    """`fsdp=2,tensor=4`, as command lines have it.

    Raises:
        ConfigError: an axis that is not there, or no number.
    """
    try:
        return MeshConfig(
            **{name: int(size) for name, size in (entry.split("=") for entry in text.split(",") if entry)}
        )
    except (TypeError, ValueError):
        raise ConfigError(f"--mesh {text}; cure: e.g. fsdp=2,tensor=4 (axes data, fsdp, tensor)") from None


def resolve(config: Mapping) -> Experiment:
    """Checks a config file's values and freezes them.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range; names the key and the cure.
    """
    experiment = _build(Experiment, config, "config")
    _check_ranges(experiment)
    return experiment


def _build(cls, values, path: str):
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} is {values!r}; cure: a group of keys: {', '.join(_fields(cls))}")
    known = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            cure = f"did you mean {path}.{near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"unknown key {path}.{key}; cure: {cure}")
    return cls(**{key: _typed(known[key], values[key], f"{path}.{key}") for key in values})


def _fields(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _typed(hint, value, path: str):
    """`value` as the type that the field is declared with."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} is {value!r}; cure: one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{path} is {value!r}; cure: a tuple, e.g. ({value!r},)")
        return tuple(_typed(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; cure: a mapping of name to number")
        return {key: _typed(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} is {value!r}, {type(value).__name__}; cure: a value of type {hint.__name__}")
    return value


def _check_ranges(e: Experiment) -> None:
    """Rules over the values of single keys and pairs of keys."""

    def need(holds: bool, key: str, cure: str) -> None:
        if not holds:
            group, name = key.split(".")
            raise ConfigError(f"config.{key} is {getattr(getattr(e, group), name)!r}; cure: {cure}")

    need(e.data.schema in SCHEMAS, "data.schema", f"one of {', '.join(SCHEMAS)}")
    need(bool(e.data.train), "data.train", "at least one file, hub id or embedded:helpsteer")
    need(0 < e.data.validation_fraction < 1, "data.validation_fraction", "a part between 0 and 1, e.g. 0.1")
    need(e.model.keep_layers == 0 or e.model.source != "random", "model.keep_layers", "0, or a model.source")
    need(e.model.keep_layers >= 0, "model.keep_layers", "0 (all) or more")
    for name in ("rows", "row_length", "micro_batches"):
        need(getattr(e.batch, name) >= 1, f"batch.{name}", "at least 1")
    for name in ("responses_per_row", "evaluation_rows"):
        need(getattr(e.batch, name) >= 0, f"batch.{name}", "0 (automatic) or more")
    need(e.batch.rows % e.batch.micro_batches == 0, "batch.micro_batches", f"a divisor of batch.rows {e.batch.rows}")
    need(e.compute.unroll >= 0, "compute.unroll", "0 (automatic) or more")
    for name in ("attention_chunk", "loss_chunk"):
        need(getattr(e.compute, name) >= 1, f"compute.{name}", "at least 1")
    cacheable = not e.compute.cache_frozen or (e.task == "reward" and e.optimizer.frozen_layers > 0)
    need(cacheable, "compute.cache_frozen", "false, or task 'reward' with optimizer.frozen_layers set")
    mesh = dataclasses.astuple(e.mesh)
    need(sum(size == -1 for size in mesh) <= 1, "mesh.data", "at most one axis of the mesh is -1")
    for name in _fields(MeshConfig):
        size = getattr(e.mesh, name)
        need(size == -1 or size >= 1, f"mesh.{name}", "at least 1, or -1 for all devices that are left")
    _check_optimizer(e, need)
    names = SCHEMAS[e.data.schema].names
    for name, weight in e.objective.attribute_weights.items():
        need(name in names, "objective.attribute_weights", f"{name} is not rated; use {', '.join(names)}")
        need(weight >= 0, "objective.attribute_weights", "weights of at least 0")
    for name, rating in e.sft.default_ratings.items():
        need(name in names, "sft.default_ratings", f"{name} is not rated; use {', '.join(names)}")
        attribute = SCHEMAS[e.data.schema][name]
        within = attribute.low <= rating <= attribute.high
        need(within, "sft.default_ratings", f"{name} from {attribute.low:g} to {attribute.high:g}")


def _check_optimizer(e: Experiment, need) -> None:
    o, t = e.optimizer, e.train
    need(o.learning_rate > 0, "optimizer.learning_rate", "more than 0")
    need(0 <= o.min_learning_rate <= o.learning_rate, "optimizer.min_learning_rate", "between 0 and learning_rate")
    for name in ("warmup_steps", "constant_steps", "weight_decay", "clip_norm"):
        need(getattr(o, name) >= 0, f"optimizer.{name}", "0 or more")
    for name in ("beta1", "beta2"):
        need(0 <= getattr(o, name) < 1, f"optimizer.{name}", "from 0 to less than 1")
    need(o.epsilon > 0, "optimizer.epsilon", "more than 0")
    need(o.frozen_layers >= 0, "optimizer.frozen_layers", "0 or more")
    need(o.max_bad_steps >= 1, "optimizer.max_bad_steps", "at least 1")
    need(t.steps > 0 or t.epochs > 0, "train.epochs", "more than 0, or set train.steps")
    for name in ("steps", "log_every", "evaluate_every", "checkpoint_every"):
        need(getattr(t, name) >= 0, f"train.{name}", "0 or more")
    need(t.keep_last >= 1, "train.keep_last", "at least 1")
