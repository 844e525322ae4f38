"""Attention that skips blocks is the attention that computes them; the shared mask is the only meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.data.packing import pack
from steerjax.models.attention.blockwise import block_plan, blockwise_attention
from steerjax.models.attention.mask import Layout, allowed, attend, causal_attention
from steerjax.models.config import LlamaConfig
from steerjax.models.flops import training_flops
from tests.helpers import host_batch, random_groups


def packed_layout(length: int, rows: int = 3) -> Layout:
    groups = random_groups([3, 1, 4, 2] * 4, seed=length)
    packed = pack(groups, length, 16, range(len(groups)))[:rows]
    batch = host_batch(groups, packed, length, 16)
    return Layout(jnp.asarray(batch.segments[0]), jnp.asarray(batch.branches[0]))


def arrays(layout: Layout, N: int, K: int, H: int = 8):
    B, T = layout.segments.shape
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N)]


@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_outputs_and_gradients_equal_dense_attention(N, K, block):
    layout = packed_layout(128)
    q, k, v, weights = arrays(layout, N, K)
    real = (layout.segments > 0)[:, :, None, None]

    def dense(q, k, v):
        return attend(q, k, v, allowed(layout, layout))

    def blockwise(q, k, v):
        return blockwise_attention(q, k, v, layout, block_plan(layout, block), block)

    def chunked(q, k, v):
        return causal_attention(q, k, v, layout, block)

    def gradients(attention):
        gradient = jax.grad(lambda *qkv: (attention(*qkv) * weights * real).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient)(q, k, v)

    for attention in (blockwise, chunked):
        np.testing.assert_allclose(jax.jit(attention)(q, k, v) * real, dense(q, k, v) * real, atol=2e-6)
        for ours, expected in zip(gradients(attention), gradients(dense), strict=True):
            np.testing.assert_allclose(ours, expected, atol=5e-6)


def test_plan_visits_exactly_the_blocks_with_an_allowed_pair():
    layout = packed_layout(128)
    plan = block_plan(layout, 16)
    mask = np.asarray(allowed(layout, layout)) & np.asarray(layout.segments > 0)[:, :, None]
    for b in range(mask.shape[0]):
        for i in range(8):
            visited = set(np.asarray(plan.keys[b, i, : plan.counts[b, i]]).tolist())
            needed = {j for j in range(8) if mask[b, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16].any()}
            assert visited == needed | {i}
    assert plan.counts.sum() < 3 * 8 * 9 / 2  # something is skipped


def test_a_query_without_a_key_in_a_visited_block_is_no_nan():
    """A block is visited for one of its queries; the others may have no key there."""
    segments = jnp.asarray([[1] * 20 + [2] * 12], jnp.int32)
    layout = Layout(segments, jnp.zeros_like(segments))
    q, k, v, _ = arrays(layout, 2, 1)
    out = blockwise_attention(q, k, v, layout, block_plan(layout, 16), 16)
    np.testing.assert_allclose(out, attend(q, k, v, allowed(layout, layout)), atol=2e-6)


def test_a_long_row_of_short_branches_costs_little_more_than_short_rows():
    """Per token, of a forward and backward pass: 16 branches of 240 on a prompt of 256, beside one branch of 256."""
    smollm2 = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3
    )

    def flops_a_token(branches: list[int]) -> float:
        numbers = np.concatenate([np.full(n, b) for b, n in enumerate([256, *branches])])[None]
        plan = block_plan(Layout(jnp.ones_like(numbers), jnp.asarray(numbers)), 256)
        pairs = int(plan.counts.sum()) * 256 * 256
        return training_flops(smollm2, numbers.size, pairs, 0.0) / numbers.size

    assert flops_a_token([240] * 16) < 1.2 * flops_a_token([256])
    assert flops_a_token([3840]) > 1.5 * flops_a_token([256])  # one branch as long is another matter
