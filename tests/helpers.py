"""Tiny models and made-up prompt groups that several tests share."""

import jax
import numpy as np
from flax.core import meta

from steerjax.data.batch import Batch, row_arrays
from steerjax.data.packing import Branch, PromptGroup
from steerjax.models.config import LlamaConfig
from steerjax.models.reward_head import RewardModel
from steerjax.training.reward import dummy_inputs, reward_inputs
from steerjax.training.state import TrainState, fresh_state, init_parameters

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    initializer_range=0.2,
)


def random_groups(responses: list[int], attributes: int = 3, seed: int = 0, longest: int = 20) -> list[PromptGroup]:
    """Groups with so many responses each; about a quarter of the ratings is missing."""
    random = np.random.default_rng(seed)
    groups, example = [], 0
    for count in responses:
        prompt, branches = random_tokens(random, longest), []
        for _ in range(count):
            mask = random.random(attributes) > 0.25
            ratings = np.where(mask, random.integers(0, 5, attributes), 0).astype(np.float32)
            branches.append(Branch(random_tokens(random, longest), ratings, mask, example, at=len(prompt)))
            example += 1
        groups.append(PromptGroup(prompt, tuple(branches)))
    return groups


def random_tokens(random: np.random.Generator, longest: int) -> np.ndarray:
    return random.integers(1, TINY.vocab_size, random.integers(3, longest)).astype(np.int32)


def host_batch(groups, rows, row_length: int, responses_per_row: int, micro_batches: int = 1) -> Batch:
    """A batch [M, B/M, ...] of plain arrays."""
    arrays = [row_arrays(groups, row, row_length, responses_per_row) for row in rows]
    return jax.tree.map(lambda *x: np.stack(x).reshape(micro_batches, -1, *x[0].shape), *arrays)


def init_params(model: RewardModel, batch: Batch, seed: int = 0) -> dict:
    """Random parameters as a plain dict."""
    first = jax.tree.map(lambda x: x[0], batch)
    return meta.unbox(model.init(jax.random.key(seed), reward_inputs(first))["params"])


def random_state(model: RewardModel, optimizer, abstract: TrainState, frozen: tuple[str, ...] = ()) -> TrainState:
    """A fresh state with random parameters, in the shards of `abstract`."""
    params = init_parameters(model, (dummy_inputs(),), abstract.params, seed=0)
    return fresh_state(params, optimizer, abstract, frozen)


def assert_trees_close(actual, expected, rtol: float, atol: float = 0.0) -> None:
    """Leaf by leaf, relative to the largest entry of the leaf; names the leaf."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        limit = atol + rtol * np.abs(b).max()
        worst = np.abs(a - b).max()
        assert worst <= limit, f"{jax.tree_util.keystr(path)}: differs by {worst}, limit {limit}"

    jax.tree_util.tree_map_with_path(check, actual, expected)
