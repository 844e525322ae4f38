"""Several models of one architecture as one: a weighted sum of their parameters, slice by slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steerjax.errors import ModelError
from steerjax.hf.description import Description
from steerjax.hf.keys import Index


def check_mergeable(models: Sequence[Description], readers: Sequence) -> None:
    """Raises ModelError: models that differ in more than their parameters; names in what."""
    first = models[0]
    for other, reader in zip(models[1:], readers[1:], strict=True):
        for what, ours, theirs in (
            ("kind", first.kind, other.kind), ("architecture", first.model, other.model),
            ("template", first.template, other.template),
            ("attributes", first.schema and first.schema.names, other.schema and other.schema.names),
            ("tokenizer", first.tokenizer.hash, other.tokenizer.hash), ("readout", first.readout, other.readout),
            ("parameters", readers[0].shapes, reader.shapes),
        ):  # fmt: skip
            if ours != theirs:
                said = f"'{other.path}' has another {what} than '{first.path}'"
                raise ModelError(f"{said}\n  cure: merge runs that were trained from one model with one recipe")


class MergedReader:
    """A reader of the weighted sum of several readers' parameters, in float32."""

    def __init__(self, readers: Sequence, weights: Sequence[float]):
        self._readers, self._weights, self.directory = readers, weights, readers[0].directory
        self.shapes = readers[0].shapes
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """As the readers' own."""
        total = 0.0
        for reader, weight in zip(self._readers, self._weights, strict=True):
            total = total + np.float32(weight) * np.asarray(reader.read(path, index, np.dtype(np.float32)), np.float32)
        return total.astype(dtype, copy=False)
