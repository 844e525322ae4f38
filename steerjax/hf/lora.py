"""Adapters folded into the weights that they adapt, slice by slice, for servers that know none; or alone, for PEFT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from steerjax.errors import ConfigError
from steerjax.hf.description import Description
from steerjax.hf.keys import CLASSIFIER, Index, tensors
from steerjax.models.config import LlamaConfig, LoraConfig

A, B = "lora_a", "lora_b"


class FoldedReader:
    """A reader of parameters with `kernel + alpha / rank * lora_a lora_b` in place of the three, in float32."""

    def __init__(self, reader, lora: LoraConfig):
        self._reader, self._scale = reader, np.float32(lora.alpha / lora.rank)
        self.directory = reader.directory
        self.shapes = {path: shape for path, shape in reader.shapes.items() if path.rpartition("/")[2] not in (A, B)}
        self.dtypes = {path: reader.dtypes[path] for path in self.shapes}

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """As the reader's own."""
        base, _, leaf = path.rpartition("/")
        if leaf != "kernel" or f"{base}/{A}" not in self._reader.shapes:
            return self._reader.read(path, index, dtype)
        wide, rank = np.dtype(np.float32), slice(0, self._reader.shapes[f"{base}/{A}"][-1])
        inputs = len(self._reader.shapes[f"{base}/{A}"]) - 1  # with the layers
        kernel = np.asarray(self._reader.read(path, index, wide))
        a = np.asarray(self._reader.read(f"{base}/{A}", (*index[:inputs], rank), wide))
        b = np.asarray(self._reader.read(f"{base}/{B}", (index[0], rank, *index[inputs:]), wide))
        layers, size = len(kernel), a.shape[-1]
        folded = np.matmul(a.reshape(layers, -1, size), b.reshape(layers, size, -1)).reshape(kernel.shape)
        return (kernel + self._scale * folded).astype(dtype, copy=False)


def folded(about: Description, reader) -> tuple[Description, Any]:
    """The model without adapters that computes the same, and its reader; a model without any as it is."""
    if not about.model.lora.rank:
        return about, reader
    plain = dataclasses.replace(about.model, lora=LoraConfig())
    return dataclasses.replace(about, model=plain), FoldedReader(reader, about.model.lora)


def write_adapter(folder: Path, config: LlamaConfig, architecture: str, labels: int, reader, base: str) -> None:
    """The adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors, with the reward head whole.

    Raises ConfigError: the model has none.
    """
    from safetensors.numpy import save_file

    lora, wide = config.lora, np.dtype(np.float32)
    if not lora.rank:
        raise ConfigError("--adapter of a model that was trained without config.model.lora; cure: leave it out")
    found, targets = {}, set()
    for tensor in tensors(config, architecture, labels):
        place, _, leaf = tensor.path.rpartition("/")
        if leaf == "kernel" and f"{place}/{A}" in reader.shapes:
            name, layer = tensor.name.removesuffix(".weight"), slice(tensor.layer, tensor.layer + 1)
            a, b = (
                reader.read(
                    f"{place}/{part}", (layer, *(slice(0, n) for n in reader.shapes[f"{place}/{part}"][1:])), wide
                )
                for part in (A, B)
            )
            found[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            found[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
            targets.add(name.rpartition(".")[2])
        elif tensor.path == "reward_head":
            head = reader.read(tensor.path, tensor.whole, wide)
            found["base_model.model.score.weight"] = tensor.to_hf(np.asarray(head))
    reward = architecture == CLASSIFIER
    said = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if reward else "CAUSAL_LM", "base_model_name_or_path": base,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": ["score"] if reward else None, "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
