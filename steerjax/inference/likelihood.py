"""Log-likelihoods of given texts under a chat model, e.g. log P(response | prompt).

An example's places are those before its targets, as in training; `continuation` makes one. What examples share is
computed once, and logits exist for a chunk of tokens at a time.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steerjax.bundle import Bundle
from steerjax.data.batch import Batch
from steerjax.data.packing import Layout
from steerjax.data.trees import Example, grow
from steerjax.errors import DataError
from steerjax.inference.packed import PackedModel
from steerjax.models.logits import token_log_likelihoods

_NAME = "likelihood"
_CHUNK = 256  # tokens of a row whose logits are held at a time


class Likelihoods(NamedTuple):
    """Of E examples, in their order."""

    log_likelihoods: np.ndarray  # float64 [E], nats: the sum over an example's targets, each times its weight
    greedy: np.ndarray  # bool [E], whether no token is likelier than any of the targets
    tokens: np.ndarray  # int64 [E], computed for an example and not for one before it in its row: they add up


def continuation(tokens: Sequence[int], start: int, root: int = 0) -> Example:
    """What asks for log P(tokens[start:] | tokens[:start]), 0 < start < len(tokens).

    Examples whose first `root` tokens are equal may share them in a row. The last token is a target only.
    """
    tokens = np.asarray(tokens, np.int32)
    places = np.arange(start - 1, len(tokens) - 1, dtype=np.int32)
    return Example(_NAME, 0, tokens[:-1], min(root, start), places, tokens[start:], np.ones(len(places), np.float32))


class LikelihoodScorer:
    """Examples -> `Likelihoods`; logits and sums in float32, added up over an example in float64.

    `row_length` and `rows` are `PackedModel`'s. Raises ModelError: no chat model; ConfigError as `PackedModel`.
    """

    def __init__(self, bundle: Bundle, *, row_length: int = 0, rows: int = 0):
        self.description = about = bundle.description
        about.expect("chat")

        def likelihoods(params, batch: Batch):
            model = bundle.module.bind({"params": params})
            hidden = model.hidden(batch.tokens, batch.positions, batch.until)
            return token_log_likelihoods(hidden, model.head, batch.targets[_NAME]["targets"], _CHUNK)

        self._packed = PackedModel(bundle, likelihoods, row_length=row_length, rows=rows)
        self.rows, self.row_length, self.counts = self._packed.rows, self._packed.row_length, self._packed.counts

    def check(self, example: Example) -> Example:
        """The example. Raises DataError: it is longer than a row, or than the model has positions for."""
        if len(example.tokens) > self._packed.longest:
            whose = "a row" if self._packed.longest == self.row_length else "the model"
            said = f"{len(example.tokens)} tokens, and {whose} holds {self._packed.longest}"
            raise DataError(said, cure="a larger row length, a model of more positions, or a shorter text")
        return example

    def __call__(self, examples: Sequence[Example]) -> Likelihoods:
        """Raises DataError as `check`."""
        count = len(examples)
        trees = grow([
            dataclasses.replace(self.check(example), objective=_NAME, number=number, unit=None)
            for number, example in enumerate(examples)
        ])  # fmt: skip
        found = Likelihoods(np.zeros(count), np.zeros(count, bool), np.zeros(count, np.int64))
        for layout, (values, likeliest) in self._packed.run(trees, self._packed.pack(trees), {_NAME: _targets}):
            computed = np.zeros(len(layout.tokens), bool)
            for example, end in layout.ends:
                own = np.flatnonzero(layout.until[: end + 1] > end)  # what its last token sees: the example's tokens
                places, number = own[example.places], example.number
                found.log_likelihoods[number] = values[places].astype(np.float64) @ example.weights.astype(np.float64)
                found.greedy[number] = likeliest[places].all()
                found.tokens[number] = np.sum(~computed[own])
                computed[own] = True
        return found


def _targets(layout: Layout) -> dict[str, np.ndarray]:
    return {"targets": np.maximum(layout.targets[_NAME], 0)}
