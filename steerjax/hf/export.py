"""A folder that transformers, vLLM and SGLang load without a line of our code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from steerjax.errors import ConfigError, ModelError
from steerjax.hf.card import model_card
from steerjax.hf.chat_template import chat_template
from steerjax.hf.config_json import DTYPES, HuggingFaceConfig, read_config, write_config
from steerjax.hf.description import Description
from steerjax.hf.keys import BARE, CAUSAL_LM, CLASSIFIER, Tensor, tensors
from steerjax.hf.tokenizer_files import special_strings, special_tokens, stop_tokens, write_tokenizer
from steerjax.hf.weights import Stored, read_folder

_NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# What a folder keeps when only its weights are written anew.
_SIDE_FILES = (
    "*token*.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "generation_config.json",
    "steerjax.json", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


def architecture_of(description: Description) -> str:
    """The architecture that a model is exported as."""
    return CLASSIFIER if description.kind == "reward" else CAUSAL_LM


def checkpoint_tensors(description: Description, reader) -> dict[str, Stored]:
    """The tensors of a checkpoint, float32, from its `bundle.reader.CheckpointReader`.

    Raises:
        ModelError: the reward head has a bias; a parameter is missing, unknown or has another shape.
    """
    if "reward_bias" in reader.shapes:
        raise ModelError(
            "the reward head has a bias, and LlamaForSequenceClassification has none: a server would drop it\n"
            "  cure: train with config.head.use_bias=False"
        )
    known = tensors(description.model, architecture_of(description), len(description.schema or ()))
    stack = (description.model.num_layers,)
    shapes = {t.path: t.ours if t.layer is None else stack + t.ours for t in known}
    if wrong := [path for path, _ in shapes.items() ^ reader.shapes.items()]:
        raise ModelError(
            f"parameter {min(wrong)} does not fit the checkpoint's config\n  cure: another step of the run"
        )

    def read(tensor: Tensor) -> np.ndarray:
        return tensor.to_hf(reader.read(tensor.path, ... if tensor.layer is None else tensor.layer))

    return {t.name: Stored(t.shape, "float32", functools.partial(read, t)) for t in known}


def folder_tensors(folder: Path, config: HuggingFaceConfig, architecture: str) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder, under the names that they have in `architecture`."""
    prefix = "" if architecture == BARE else "model."
    names = [t.name for t in tensors(config.model, config.architecture, len(config.labels), prefix=prefix)]
    return dict(zip(names, (stored for _, stored in read_folder(folder, config)), strict=True))


def export_model(
    description: Description,
    stored: Mapping[str, Stored],
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
        evaluation: attribute -> metric -> value, for the model card.

    Raises:
        ModelError: what no server can load, a tensor that overflows in `dtype`, a folder that cannot be written.
    """
    tokenizer, template, reward = description.tokenizer, description.template, description.kind == "reward"
    ids = {f"{key}_id": tokenizer.token_id(string) for key, string in special_tokens(tokenizer, template).items()}
    for wrong, message in (
        (description.schema is None, "a classifier that does not say which attributes it rates gets no template of ours"
         "\n  cure: leave --template out to change dtype or shard size only"),
        (description.readout != "last", f"the reward is read with readout '{description.readout}', and every server "
         "reads at the last token\n  cure: train with config.head.readout='last'"),
        ("pad_token_id" not in ids, "the tokenizer has no token to pad with, and a classifier needs one"
         "\n  cure: add a <pad>"),
    ):  # fmt: skip
        if reward and wrong:
            raise ModelError(message)
    config = HuggingFaceConfig(
        model=description.model,
        architecture=architecture_of(description),
        labels=description.schema.names if reward else (),
        dtype=next(iter(stored.values())).dtype if dtype == "auto" else dtype,  # the embedding's
        raw=ids | {"problem_type": "regression"},
    )
    written_template = chat_template(
        template,
        description.schema,
        kind=description.kind,
        default_ratings=description.default_ratings,
        system_prompt=description.system_prompt,
        special_strings=special_strings(tokenizer, template),
    )
    with new_folder(output) as folder:
        write_weights(folder, stored, dtype, max_shard_size)
        write_tokenizer(folder, tokenizer, template, written_template)
        _write_json(folder / "config.json", write_config(config))
        if not reward:
            _write_json(folder / "generation_config.json", ids | {"eos_token_id": stop_tokens(tokenizer, template)})
        _write_json(folder / "steerjax.json", description.to_json())
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


def write_weights(folder: Path, stored: Mapping[str, Stored], dtype: str, max_shard_size: str) -> None:
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
    dtypes = {name: _NUMPY[tensor.dtype if dtype == "auto" else dtype] for name, tensor in stored.items()}
    plan = split_state_dict_into_shards_factory(
        {name: (name, tensor.shape) for name, tensor in stored.items()},
        get_storage_size=lambda tensor: math.prod(tensor[1]) * dtypes[tensor[0]].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in ((folder / file, names) for file, names in plan.filename_to_tensors.items()):
        arrays = {name: _cast(stored[name].read(), dtypes[name], name) for name in names}
        file.touch()
        mode = file.stat().st_mode
        try:
            save_file(arrays, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file.name}: {error}") from error
        file.chmod(mode)  # safetensors lets nobody but the owner read it
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast is not array and (lost := array[np.isfinite(array) & ~np.isfinite(cast)]).size:
        raise ModelError(
            f"{name} holds {float(np.abs(lost).max()):g}, which overflows in {dtype.name}\n"
            "  cure: --dtype bfloat16 or float32"
        )
    return cast


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
