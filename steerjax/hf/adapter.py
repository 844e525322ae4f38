"""PEFT's adapters: written beside a base model, and read as the model that both make."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from steerjax.errors import ConfigError, ModelError
from steerjax.hf.config_json import HuggingFaceConfig, read_config
from steerjax.hf.description import read_about
from steerjax.hf.keys import CAUSAL_LM, CLASSIFIER, HEAD, adapter_tensors
from steerjax.hf.weights import FolderReader, TensorReader, check_finite, check_tensors, file_headers, resolve_source
from steerjax.models.config import LlamaConfig, LoraConfig
from steerjax.typed import PositiveFloat, Size, read_json, typed

FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it with PEFT's merge_and_unload, and give the merged folder"
# Known not to change what an adapter computes; of any other key only nothing (null, false, empty) is taken.
_HARMLESS = (
    "auto_mapping", "revision", "inference_mode", "init_lora_weights", "peft_version", "target_modules",
    "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size", "modules_to_save",
)  # fmt: skip


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True))
class _Said:
    """What is read of adapter_config.json."""

    base_model_name_or_path: str
    peft_type: Literal["LORA"]
    task_type: Literal["SEQ_CLS", "CAUSAL_LM"]
    r: Size
    lora_alpha: PositiveFloat = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: Literal["none"] = "none"


def write_adapter(folder: Path, config: LlamaConfig, architecture: str, labels: int, reader, base: str) -> None:
    """The adapters as PEFT reads them, with the reward head whole. Raises ConfigError: the model has none."""
    from safetensors.numpy import save_file

    lora, wide = config.lora, np.dtype(np.float32)
    if not lora.rank:
        raise ConfigError("--adapter of a model that was trained without config.model.lora; cure: leave it out")
    found = adapter_tensors(config, architecture, labels)
    reward = architecture == CLASSIFIER
    said = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if reward else "CAUSAL_LM", "base_model_name_or_path": base,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none",
        "target_modules": sorted({t.name.split(".")[-3] for t in found if t.path != HEAD}),
        "modules_to_save": ["score"] if reward else None, "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    arrays = {t.name: np.asarray(reader.read(t.path, t.whole, wide)) for t in found}
    for name, array in arrays.items():
        check_finite(array, name, reader.directory)
    arrays = {t.name: t.to_hf(arrays[t.name]) for t in found}
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def is_adapter(folder: Path) -> bool:
    """Whether this is a folder that PEFT wrote."""
    return (folder / FILE).is_file()


def folder_config(folder: Path) -> HuggingFaceConfig:
    """`read_config` of a Hugging Face folder; of an adapter its base's, with the adapters and the adapter's own head.

    Raises ModelError: as `AdapterReader`.
    """
    return AdapterReader(folder).config if is_adapter(folder) else read_config(folder)


class AdapterReader(TensorReader):
    """An adapter's parameters beside those of its base, as `FolderReader` has a folder's.

    Attributes:
        base: the folder of the base.
        config: see `folder_config`.

    Raises ModelError: no base there, another base, or an adapter of a kind that we do not compute.
    """

    def __init__(self, folder: Path):
        file = folder / FILE
        said = _read_said(file)
        try:
            self.base = resolve_source(said.base_model_name_or_path)
            base = read_config(self.base)
        except ModelError as error:
            cure = f"the base model that it was trained on, as base_model_name_or_path in {FILE}"
            raise ModelError(f"'{file}': {error.args[0].splitlines()[0]}\n  cure: {cure}") from None
        headers, reward = file_headers(folder / WEIGHTS), said.task_type == "SEQ_CLS"
        architecture = CLASSIFIER if reward else CAUSAL_LM
        alpha = said.lora_alpha * (math.sqrt(said.r) if said.use_rslora else 1.0)
        lora = {"rank": said.r, "alpha": alpha, "dropout": said.lora_dropout}
        lora = typed(LoraConfig, lora, f"'{file}'", ModelError)
        every = dataclasses.replace(base.model, lora=lora)
        possible = {t.name: t.path.split("/") for t in adapter_tensors(every, architecture) if t.path != HEAD}
        found = sorted({possible[name][3] for name in headers if name in possible})
        own = next((header.shape[0] for name, header in headers.items() if name.endswith(".score.weight")), 0)
        outputs = own or len(base.labels)
        if not found or reward != bool(outputs) or not (reward or base.architecture == CAUSAL_LM):
            kind = f"a {said.task_type} adapter of {len(found)} projections with {outputs} outputs"
            cure = "its own base; of a reward model, modules_to_save=['score'] when it is trained"
            raise ModelError(f"'{folder}' is {kind}, on a {base.architecture}\n  cure: {cure}")
        model = dataclasses.replace(base.model, lora=dataclasses.replace(lora, targets=tuple(found)))
        known = [t for t in adapter_tensors(model, architecture, outputs) if own or t.path != HEAD]
        check_tensors(f"'{folder}' does not fit its base '{self.base}'", headers, known, f"its own base; or {_MERGE}")
        whole = FolderReader(self.base, base)
        stacks = whole.stacks | self.stacked(known, headers)
        super().__init__(folder, {path: one for path, one in stacks.items() if not (reward and path == "lm_head")})
        about = read_about(folder)
        names = about.schema.names if about and about.schema else base.labels
        labels = names if len(names) == outputs else tuple(f"LABEL_{i}" for i in range(outputs))
        self.config = dataclasses.replace(base, model=model, architecture=architecture, labels=labels if reward else ())


def _read_said(file: Path) -> _Said:
    raw = read_json(dict[str, Any], file, ModelError, "download it again")
    ours = {field.name for field in dataclasses.fields(_Said)}
    for key, value in raw.items():
        if value and key not in ours and key not in _HARMLESS:
            raise ModelError(f"'{file}': {key} is {value!r}, which is not computed here\n  cure: {_MERGE}")
    return typed(_Said, {key: value for key, value in raw.items() if key in ours}, str(file), ModelError)
