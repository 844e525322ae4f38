"""A folder that transformers, vLLM and SGLang load without a line of our code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from steerjax import __version__
from steerjax.errors import ConfigError, ModelError
from steerjax.hf.card import model_card
from steerjax.hf.chat_template import chat_template
from steerjax.hf.config_json import DTYPES, HuggingFaceConfig, read_config, write_config
from steerjax.hf.description import About, Description
from steerjax.hf.keys import BARE, CAUSAL_LM, CLASSIFIER, Index, Tensor, tensors, whole
from steerjax.hf.tokenizer_files import special_strings, special_tokens, stop_tokens, write_tokenizer
from steerjax.hf.weights import FolderWeights

_NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# What a folder keeps when only its weights are written anew.
_SIDE_FILES = (
    "*token*.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "generation_config.json",
    "steerjax.json", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


class ParameterReader(Protocol):
    """Parameters by path, read by parts: `bundle.reader.CheckpointReader`."""

    shapes: Mapping[str, tuple[int, ...]]

    def read(self, path: str, index: Index) -> np.ndarray: ...


@dataclass(frozen=True)
class Stored:
    """A tensor of the new folder and how to get it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def architecture_of(description: Description) -> str:
    """The architecture that a model is exported as."""
    return CLASSIFIER if description.kind == "reward" else CAUSAL_LM


def checkpoint_tensors(description: Description, reader: ParameterReader) -> list[Stored]:
    """The tensors of a checkpoint, float32.

    Raises:
        ModelError: the reward head has a bias; a parameter is missing, unknown or has another shape.
    """
    if "reward_bias" in reader.shapes:
        raise ModelError(
            "the reward head has a bias, and LlamaForSequenceClassification has none: a server would drop it\n"
            "  cure: train with config.head.use_bias=False"
        )
    known = tensors(description.model, architecture_of(description), len(description.schema or ()))
    layers = description.model.num_layers
    shapes = {t.path: t.our_shape if t.layer is None else (layers, *t.our_shape) for t in known}
    for path in sorted(shapes.keys() | reader.shapes.keys()):
        if shapes.get(path) != reader.shapes.get(path):
            raise ModelError(
                f"parameter {path} has shape {reader.shapes.get(path)}, and the checkpoint's config says "
                f"{shapes.get(path)}\n  cure: another step of the run"
            )

    def read(tensor: Tensor) -> np.ndarray:
        layer = () if tensor.layer is None else (slice(tensor.layer, tensor.layer + 1),)
        array = reader.read(tensor.path, (*layer, *whole(tensor.our_shape)))
        return tensor.to_hf(array.reshape(tensor.our_shape))

    return [Stored(t.name, t.shape, "float32", lambda t=t: read(t)) for t in known]


def folder_tensors(folder: Path, config: HuggingFaceConfig, architecture: str) -> list[Stored]:
    """The tensors of a Hugging Face folder, under the names that they have in `architecture`."""
    weights = FolderWeights(folder)
    old = weights.expected(config)
    prefix = "" if architecture == BARE else "model."
    new = tensors(config.model, config.architecture, len(config.labels), prefix=prefix)
    return [
        Stored(n.name, n.shape, weights.dtypes[o.name], lambda o=o: weights.read(o.name))
        for o, n in zip(old, new, strict=True)
    ]


def export_model(
    description: Description,
    stored: Sequence[Stored],
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    evaluation: Mapping | None = None,
) -> None:
    """Writes the whole folder of one of our models, or of a chat model that gets our template.

    Args:
        stored: from `checkpoint_tensors` or `folder_tensors`.
        output: a folder that is not there yet, or empty.
        dtype: float32, bfloat16, float16, or "auto" for each tensor's own.
        max_shard_size: of a safetensors file, e.g. "5GB"; a greater tensor has a file of its own.
        evaluation: attribute -> metric -> value, for the model card.

    Raises:
        ModelError: what no server can load, a tensor that overflows in `dtype`, a folder that cannot be written.
    """
    names = special_tokens(description.tokenizer, description.template)
    ids = {f"{key}_id": description.tokenizer.token_id(string) for key, string in names.items()}
    reward = description.kind == "reward"
    if reward:
        _check_servable(description, ids)
    config = HuggingFaceConfig(
        model=description.model,
        architecture=architecture_of(description),
        labels=description.schema.names if reward else (),
        dtype=stored[0].dtype if dtype == "auto" else dtype,  # the embedding's
        raw=ids | {"problem_type": "regression"},
    )
    template = chat_template(
        description.template,
        description.schema,
        kind=description.kind,
        default_ratings=description.default_ratings,
        system_prompt=description.system_prompt,
        special_strings=special_strings(description.tokenizer, description.template),
    )
    with new_folder(output) as folder:
        write_weights(folder, stored, dtype, max_shard_size)
        write_tokenizer(folder, description.tokenizer, description.template, template)
        _write_json(folder / "config.json", write_config(config))
        if not reward:
            stops = {"eos_token_id": stop_tokens(description.tokenizer, description.template)}
            _write_json(folder / "generation_config.json", ids | stops)
        _write_json(folder / "steerjax.json", dataclasses.asdict(_about(description)))
        (folder / "README.md").write_text(model_card(description, evaluation=evaluation), encoding="utf-8")


def convert_folder(source: Path, output: Path, *, dtype: str = "auto", max_shard_size: str = "5GB") -> None:
    """Writes a Hugging Face folder anew, in another dtype or shard size; tokenizer, template and card stay.

    Raises:
        ModelError: as `export_model`, or the source is none that we read.
    """
    config = read_config(source)
    stored = folder_tensors(source, config, config.architecture)
    with new_folder(output) as folder:
        write_weights(folder, stored, dtype, max_shard_size)
        main = config.dtype if dtype == "auto" else dtype
        _write_json(folder / "config.json", write_config(dataclasses.replace(config, dtype=main)))
        for file in (file for pattern in _SIDE_FILES for file in source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well; otherwise nothing is left.

    Raises:
        ModelError: `output` is there and not empty, or cannot be written.
    """
    output = output.absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ModelError(f"'{output}' is there already\n  cure: another --output, or remove it")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, output)
    except OSError as error:
        raise ModelError(f"'{output}' cannot be written: {error}\n  cure: a writable place with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(folder: Path, stored: Sequence[Stored], dtype: str, max_shard_size: str) -> None:
    """model.safetensors, or several files and an index. One file at a time is in memory.

    Raises:
        ConfigError: a dtype or size that is none.
        ModelError: a number that is finite and would not be in `dtype`; names the tensor.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype {dtype!r}; cure: auto, {', '.join(DTYPES)}")
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", max_shard_size, re.IGNORECASE):
        raise ConfigError(f"--max-shard-size {max_shard_size!r}; cure: a size such as 5GB or 500MB")
    dtypes = {tensor.name: _NUMPY[tensor.dtype if dtype == "auto" else dtype] for tensor in stored}
    plan = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in stored},
        get_storage_size=lambda tensor: math.prod(tensor.shape) * dtypes[tensor.name].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    read = {tensor.name: tensor.read for tensor in stored}
    for file, names in plan.filename_to_tensors.items():
        arrays = {name: _cast(read[name](), dtypes[name], name) for name in names}
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from error
        (folder / file).chmod(mode)  # safetensors lets nobody but the owner read it
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    lost = array[np.isfinite(array) & ~np.isfinite(cast)]
    if lost.size:
        largest = float(np.abs(lost).max())
        raise ModelError(
            f"{name} holds {largest:g}, which overflows in {dtype.name}\n  cure: --dtype bfloat16 or float32"
        )
    return cast


def _check_servable(description: Description, ids: Mapping[str, int | None]) -> None:
    """What a server needs of a reward model."""
    if description.schema is None:
        raise ModelError(
            "a classifier that does not say which attributes it rates gets no template of ours\n"
            "  cure: leave --template out to change dtype or shard size only"
        )
    if description.readout != "last":
        raise ModelError(
            f"the reward is read with readout '{description.readout}', and every server reads at the last token\n"
            "  cure: train with config.head.readout='last'"
        )
    if "pad_token_id" not in ids:
        raise ModelError("the tokenizer has no token to pad with, and a classifier needs one\n  cure: add a <pad>")


def _about(description: Description) -> About:
    schema, ratings = description.schema, description.default_ratings
    return About(
        kind=description.kind,
        template=description.template.name,
        attributes=schema.attributes if schema is not None else None,
        system_prompt=description.system_prompt,
        readout=description.readout,
        default_ratings=dict(ratings) if ratings is not None else None,
        provenance=dict(description.provenance),
        steerjax=__version__,
    )


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
