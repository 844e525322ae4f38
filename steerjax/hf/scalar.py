"""A reward model of several attributes as one of a single score, their weighted sum, for tools that want one number."""

from __future__ import annotations

import dataclasses

import numpy as np

from steerjax.errors import ModelError
from steerjax.hf.description import Description
from steerjax.hf.keys import HEAD, Index
from steerjax.schema import Attribute, Schema


def scalar_description(about: Description, name: str, weights: dict[str, float]) -> Description:
    """The model with this score as its only attribute; its range is what the attributes' ranges allow."""
    ends = [(weight * a.low, weight * a.high) for a in about.schema.attributes if (weight := weights.get(a.name))]
    low, high = (sum(pick(pair) for pair in ends) for pick in (min, max))
    meaning = " + ".join(f"{weight:g} {attribute}" for attribute, weight in weights.items())
    provenance = {**about.provenance, "scalar": weights, "rated_attributes": None}
    return dataclasses.replace(about, schema=Schema((Attribute(name, low, high, meaning),)), provenance=provenance)


class ScalarReader:
    """A reader of parameters whose reward head [D A] is folded to [D 1], summed in float64."""

    def __init__(self, reader, schema: Schema, weights: dict[str, float]):
        if HEAD not in reader.shapes:
            raise ModelError("--scalar of a model without a reward head\n  cure: leave it out for a chat model")
        self._reader, self.directory = reader, reader.directory
        self._weights = np.array([weights.get(name, 0.0) for name in schema.names])
        self.shapes = {**reader.shapes, HEAD: (reader.shapes[HEAD][0], 1)}
        self.dtypes = {**reader.dtypes, HEAD: np.dtype(np.float32)}

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """As the reader's own."""
        if path != HEAD:
            return self._reader.read(path, index, dtype)
        whole = tuple(slice(0, size) for size in self._reader.shapes[HEAD])
        head = np.asarray(self._reader.read(path, whole, np.dtype(np.float32)), np.float64)
        return (head @ self._weights)[:, None].astype(dtype)[index]
