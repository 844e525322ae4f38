"""A reward model of several attributes as one of a single score, their weighted sum, for tools that want one number."""

from __future__ import annotations

import dataclasses

import numpy as np

from steerjax.errors import ConfigError, DataError, ModelError
from steerjax.hf.description import Description
from steerjax.hf.keys import Index
from steerjax.schema import SCALAR_WEIGHTS, Attribute, Schema

HEAD = "reward_head"


def parse_scalar(text: str, schema: Schema) -> tuple[str, dict[str, float]]:
    """`goodness` or another preset, or `NAME=W,...`: the score's name and the attributes' weights.

    Raises ConfigError: an attribute that the model has not, no number, or no weight but 0.
    """
    name, weights = text, SCALAR_WEIGHTS.get(text)
    try:
        if weights is None:
            pairs = [entry.partition("=") for entry in text.split(",")]
            name, weights = "score", {name.strip(): float(value) for name, _, value in pairs}
            if len(weights) < len(pairs):
                raise ValueError("an attribute stands twice")
        for attribute in weights:
            schema[attribute]  # raises where there is none
        if not any(weights.values()) or not np.isfinite(list(weights.values())).all():
            raise ValueError("no weight but 0, or one that is not finite")
    except (ValueError, DataError) as error:
        cure = f"{', '.join(SCALAR_WEIGHTS)}, or NAME=W,... of {', '.join(schema.names)}"
        raise ConfigError(f"--scalar {text}: {error}\n  cure: {cure}") from None
    return name, weights


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
        self._reader = reader
        self._weights = np.array([weights.get(name, 0.0) for name in schema.names])
        self.shapes = {**reader.shapes, HEAD: (reader.shapes[HEAD][0], 1)}
        self.dtypes = {**reader.dtypes, HEAD: np.dtype(np.float32)}

    def __getattr__(self, name: str):
        return getattr(self._reader, name)

    def read(self, path: str, index: Index, dtype) -> np.ndarray:
        """As the reader's own."""
        if path != HEAD:
            return self._reader.read(path, index, dtype)
        whole = tuple(slice(0, size) for size in self._reader.shapes[HEAD])
        head = np.asarray(self._reader.read(path, whole, np.dtype(np.float32)), np.float64)
        return (head @ self._weights)[:, None].astype(dtype)[index]
