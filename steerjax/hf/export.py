"""A folder that transformers, vLLM and SGLang load without a line of our code."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from steerjax.checksums import write_list
from steerjax.errors import ConfigError, ModelError
from steerjax.files import whole_folder
from steerjax.hf.adapter import write_adapter
from steerjax.hf.card import model_card
from steerjax.hf.chat_template import chat_template
from steerjax.hf.config_json import DTYPES, HuggingFaceConfig, read_config, write_config
from steerjax.hf.description import Description
from steerjax.hf.keys import BARE, CAUSAL_LM, CLASSIFIER, Tensor, stacked_shapes, tensors
from steerjax.hf.tokenizer_files import special_strings, special_tokens, stop_tokens, write_tokenizer
from steerjax.hf.weights import FolderReader, check_finite, unfit
from steerjax.locks import only_writer
from steerjax.signals import cleans_up

CARD = "README.md"  # people edit it and nothing reads it, so it is not listed
# What a folder keeps when only its weights are written anew.
_SIDE_FILES = (
    "*token*.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "generation_config.json",
    "steerjax.json", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


def export_model(
    description: Description,
    reader,
    output: Path,
    *,
    dtype: str,
    max_shard_size: str,
    evaluation: Mapping | None = None,
    results: Sequence = (),
    adapter: bool = False,
) -> None:
    """Writes the whole folder of one of our models, or of a chat model that gets our template.

    Args:
        reader: of the parameters, `bundle.reader.open_reader`.
        output: a folder that is not there yet, or empty.
        dtype: float32, bfloat16, float16, or "auto" for each tensor's own.
        evaluation, results: for the model card (`card.model_card`).
        adapter: PEFT's adapter in place of the whole weights.

    Raises ModelError: what no server can load, or would take from users' texts, a tensor that overflows in `dtype`, a
    folder that cannot be written.
    """
    tokenizer, template, reward = description.tokenizer, description.template, description.kind == "reward"
    ids = {f"{key}_id": tokenizer.token_id(string) for key, string in special_tokens(tokenizer, template).items()}
    if reward:
        _check_servable(description, reader, ids)
    kind, labels = (CLASSIFIER, description.schema.names) if reward else (CAUSAL_LM, ())
    config = HuggingFaceConfig(description.model, kind, labels, dtype, ids | {"problem_type": "regression"})
    written_template = chat_template(
        template,
        description.schema,
        kind=description.kind,
        default_ratings=description.default_ratings,
        system_prompt=description.system_prompt,
        special_strings=special_strings(tokenizer, template),
    )
    with new_folder(output) as folder:
        write_tokenizer(folder, tokenizer, template, written_template)  # first, as it refuses some
        if adapter:
            base = str(description.provenance.get("base_model", ""))
            write_adapter(folder, description.model, kind, len(labels), reader, base)
        else:
            write_model(folder, config, reader, dtype, max_shard_size)
        if not reward and not adapter:
            _write_json(folder / "generation_config.json", ids | {"eos_token_id": stop_tokens(tokenizer, template)})
        _write_json(folder / "steerjax.json", description.to_json())
        card = model_card(description, evaluation=evaluation, name=output.name, results=results)
        (folder / CARD).write_text(card, encoding="utf-8")


def _check_servable(description: Description, reader, ids: Mapping) -> None:
    """What a server needs of a reward model."""
    for wrong, said, cure in (
        (description.schema is None, "a classifier that does not say which attributes it rates gets no template",
         "leave --template out to change dtype or shard size only"),
        ("reward_bias" in reader.shapes, "the reward head has a bias, which no server reads",
         "train with config.head.use_bias=False"),
        (description.readout != "last", "the reward is read with readout 'mean', and servers read at the last token",
         "train with config.head.readout='last'"),
        ("pad_token_id" not in ids, "the tokenizer has no token to pad with, which a classifier needs", "add a <pad>"),
    ):  # fmt: skip
        if wrong:
            raise ModelError(f"{said}\n  cure: {cure}")


def convert_folder(source: Path, output: Path, *, dtype: str, max_shard_size: str) -> None:
    """Writes a Hugging Face folder anew, in another dtype or shard size; tokenizer, template and card stay.

    Raises ModelError: as `export_model`, or the source is none that we read.
    """
    config = read_config(source)
    reader = FolderReader(source, config)
    with new_folder(output) as folder:
        write_model(folder, config, reader, dtype, max_shard_size)
        for file in (file for pattern in _SIDE_FILES for file in source.glob(pattern)):
            _copy(file, folder / file.name)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name, listed, when the block ends well; otherwise nothing is left.

    Raises ModelError: `output` is there and not empty. WriteError, LockedError: it cannot be written, or another does.
    """
    with cleans_up(), only_writer(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ModelError(f"'{output}' is there already\n  cure: another --output, or remove it")
        with whole_folder(output, SafetensorError) as folder:
            yield folder
            write_list(folder, leave=(CARD,))


def _copy(source: Path, path: Path) -> None:
    """A side file; without `auto_map`, which names code that is not beside it."""
    said = json.loads(source.read_text(encoding="utf-8")) if source.name == "tokenizer_config.json" else {}
    if "auto_map" in said:
        _write_json(path, {key: value for key, value in said.items() if key != "auto_map"})
    else:
        shutil.copyfile(source, path)


def write_model(folder: Path, config: HuggingFaceConfig, reader, dtype: str, max_shard_size: str) -> None:
    """config.json, and model.safetensors, or several files and an index. One file at a time is in memory.

    Raises ConfigError: a dtype or size that is none. ModelError: parameters that are not the config's or not
    finite, or a finite number that would be none in `dtype`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    if dtype not in (known := ("auto", *DTYPES.values())):
        raise ConfigError(f"--dtype {dtype!r}; cure: {', '.join(known)}")
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", max_shard_size, re.IGNORECASE):
        raise ConfigError(f"--max-shard-size {max_shard_size!r}; cure: a size such as 5GB or 500MB")
    prefix = "" if config.architecture == BARE else "model."
    known = tensors(config.model, config.architecture, len(config.labels), prefix=prefix)
    shapes = stacked_shapes(known)
    if wrong := [path for path, _ in shapes.items() ^ reader.shapes.items()]:
        raise unfit(reader, min(wrong), shapes.get(min(wrong)))
    dtypes = {t.name: np.dtype(reader.dtypes[t.path] if dtype == "auto" else dtype) for t in known}
    by_name = {t.name: t for t in known}
    plan = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda t: math.prod(t.shape) * dtypes[t.name].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        arrays = {name: _read(reader, by_name[name], dtypes[name]) for name in names}
        (file := folder / file).touch()
        mode = file.stat().st_mode
        save_file(arrays, file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors lets nobody but the owner read it
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    main = dtypes[known[0].name].name  # the embedding's
    _write_json(folder / "config.json", write_config(dataclasses.replace(config, dtype=main)))


def _read(reader, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    array = reader.read(tensor.path, tensor.whole, reader.dtypes[tensor.path])
    check_finite(array, tensor.name, reader.directory)
    array = tensor.to_hf(array)
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast is not array and (lost := array[np.isfinite(array) & ~np.isfinite(cast)]).size:
        said = f"{tensor.name} holds {float(np.abs(lost).max()):g}, which overflows in {dtype.name}"
        raise ModelError(f"{said}\n  cure: --dtype bfloat16 or float32")
    return cast


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
