"""Attention that skips blocks is the attention that computes them, and skips what it can."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.models.attention.blockwise import block_plan, blockwise_attention
from steerjax.models.config import LlamaConfig
from steerjax.models.flops import training_flops
from tests.models.attention.forests import (
    Node,
    arrays,
    assert_equal,
    attention,
    block_kinds,
    by_definition,
    lay_out,
    random_rows,
    values_and_gradients,
)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("name", ["blockwise", "chunked"])
def test_outputs_and_gradients_equal_the_definition(name, N, K, block):
    until, mask, _ = random_rows(3, 128, longest=30, padding=40)
    q, k, v, weights = arrays(3, 128, N, K, H=8)
    ours = values_and_gradients(functools.partial(attention, name, block), q, k, v, weights, until)
    assert_equal(ours, values_and_gradients(by_definition, q, k, v, weights, mask))


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize(("start", "length"), [(0, 256), (64, 128)])
def test_exactly_the_blocks_with_an_allowed_pair_are_visited_and_full_ones_not_masked(start, length, block):
    """The full ones first, so that a loop of their own needs no mask."""
    skipped = full = 0
    for seed in range(5):
        until, mask, _ = random_rows(2, 256, longest=80, padding=70, seed=seed)
        plan = block_plan(jnp.asarray(until), block, start, length)
        for row in range(2):
            kinds = block_kinds(mask[row, start : start + length], block)
            assert plan.queries[row].tolist() == list(range(start // block, (start + length) // block))
            for i, kind in enumerate(kinds):
                assert plan.keys[row, i].tolist() == [j for k in (2, 1, 0) for j in np.flatnonzero(kind == k)]
                assert plan.full[row, i] == (kind == 2).sum()
                assert plan.visited[row, i] == (kind > 0).sum()
            skipped += (np.tril(kinds == 0, start // block)).sum()
            full += (kinds == 2).sum()
    assert skipped
    assert full


def test_a_query_without_a_key_in_a_visited_block_is_no_nan():
    """A block is visited for one of its queries; the others may have no key there, in a first block or a later one."""
    forest = (Node(3), Node(20, (Node(9), Node(20))), Node(12))
    until, mask = (x[None] for x in lay_out(forest, 64))
    q, k, v, weights = arrays(1, 64, 2, 1, H=8)
    q = q * 30  # with scores far apart

    def blockwise(q, k, v, until):
        return blockwise_attention(q, k, v, until, None, block_plan(until, 16), 16)

    ours = values_and_gradients(blockwise, q, k, v, weights, until)
    assert all(bool(jnp.isfinite(x).all()) for x in ours)
    assert_equal(ours, values_and_gradients(by_definition, q, k, v, weights, mask))


def test_a_long_row_of_short_branches_costs_little_more_than_short_rows():
    """Per token, of a forward and backward pass: 16 branches of 240 on a prompt of 256, beside one branch of 256."""
    smollm2 = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3
    )

    def flops_a_token(branches: list[int]) -> float:
        tokens = 256 + sum(branches)
        until, _ = lay_out([Node(256, tuple(Node(length) for length in branches))], tokens)
        pairs = int(block_plan(jnp.asarray(until[None]), 256).visited.sum()) * 256 * 256
        return training_flops(smollm2, tokens, pairs, 0.0) / tokens

    assert flops_a_token([240] * 16) < 1.2 * flops_a_token([256])
    assert flops_a_token([3840]) > 1.5 * flops_a_token([256])  # one branch as long is another matter
