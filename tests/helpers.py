"""Tiny models and made-up examples that several tests share."""

from collections.abc import Iterable

import jax
import numpy as np
import pytest
from flax.core import meta

from steerjax.data.batch import Batch, RowBuilder
from steerjax.data.trees import Example
from steerjax.models.config import LlamaConfig
from steerjax.objectives import Setting
from steerjax.objectives.objective import TRAIN
from steerjax.objectives.regression import Regression, RegressionConfig
from steerjax.objectives.sft import SFT, SFTConfig
from steerjax.schema import Attribute, Schema
from steerjax.training.step import counts_of, make_loss

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    initializer_range=0.2,
)
SCHEMA = Schema(tuple(Attribute(name) for name in "abc"))
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}


def regression(average: str = "ratings") -> Regression:
    """Over three attributes, without a renderer."""
    return Regression(RegressionConfig(average=average, attribute_weights=WEIGHTS), Setting(SCHEMA, None))


def sft(loss_chunk: int = 16) -> SFT:
    return SFT(SFTConfig(), Setting(SCHEMA, None, loss_chunk))


def random_tokens(random: np.random.Generator, longest: int) -> np.ndarray:
    return random.integers(1, TINY.vocab_size, random.integers(3, longest)).astype(np.int32)


def random_ratings(random: np.random.Generator) -> dict[str, float]:
    """About a quarter is missing, but not all."""
    names = [name for name in SCHEMA.names if random.random() > 0.25] or ["a"]
    return {name: float(random.integers(0, 5)) for name in names}


def rated_examples(objective: Regression, responses: list[int], seed: int = 0, longest: int = 20) -> list[Example]:
    """Prompts with so many rated responses each."""
    random = np.random.default_rng(seed)
    examples = []
    for count in responses:
        prompt = random_tokens(random, longest)
        for _ in range(count):
            tokens = np.concatenate([prompt, random_tokens(random, longest)])
            examples.append(objective.example(TRAIN, tokens, len(prompt), random_ratings(random)))
    objective.data["validation"] = objective.data[TRAIN]
    objective.check_data()
    return examples


def builder(objectives, trees, row_length: int) -> RowBuilder:
    return RowBuilder(trees, row_length, {o.name: o.arrays for o in objectives})


def host_batch(objectives, trees, rows, row_length: int, micro_batches: int = 1) -> Batch:
    """A batch [M, B/M, ...] of plain arrays."""
    build = builder(objectives, trees, row_length)
    arrays = [build(row) for row in rows]
    return jax.tree.map(lambda *x: np.stack(x).reshape(micro_batches, -1, *x[0].shape), *arrays)


def init_params(module, seed: int = 0) -> dict:
    """Random parameters as a plain dict."""
    return meta.unbox(jax.jit(lambda key: module.init(key, method="initialize"))(jax.random.key(seed))["params"])


def loss_and_gradients(module, objectives, batch: Batch, params: dict, frozen_layers: int = 0):
    """(loss, sums), gradients of a batch [1, B, ...]."""
    loss = make_loss(module, objectives, frozen_layers)
    first = jax.tree.map(lambda x: x[0], batch)
    counts = counts_of(objectives, batch)
    return jax.jit(jax.value_and_grad(lambda p: loss(p, first, counts), has_aux=True))(params)


def outputs_at_ends(module, objective, trees, rows, row_length: int, params: dict) -> dict[int, np.ndarray]:
    """Example number -> what the objective's outputs are where it ends."""
    batch = jax.tree.map(lambda x: x[0], host_batch([objective], trees, rows, row_length))
    outputs = jax.jit(module.apply)({"params": params}, batch.tokens, batch.positions, batch.until)
    build = builder([objective], trees, row_length)
    return {
        example.number: np.asarray(output[place])
        for row, output in zip(rows, outputs, strict=True)
        for example, place in build.layout(row).ends
    }


def assert_trees_close(actual, expected, rtol: float, atol: float = 0.0) -> None:
    """Leaf by leaf, relative to the largest entry of the leaf; names the leaf."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        limit = atol + rtol * np.abs(b).max()
        worst = np.abs(a - b).max()
        assert worst <= limit, f"{jax.tree_util.keystr(path)}: differs by {worst}, limit {limit}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def slow_but(plain, cases: Iterable) -> list:
    """Cases of `pytest.mark.parametrize`: those that are `plain` (one, or a tuple) as they are, the others slow."""
    plain = plain if isinstance(plain, tuple) else (plain,)
    return [case if case in plain else pytest.param(case, marks=pytest.mark.slow) for case in cases]
