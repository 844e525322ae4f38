"""Adapters folded into the weights that they adapt, slice by slice, for servers that know none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from steerjax.hf.description import Description
from steerjax.hf.keys import A, B, Index
from steerjax.models.config import LoraConfig


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
