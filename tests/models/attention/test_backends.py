"""Every attention back end is dense attention under the one mask: values, gradients, and what `auto` chooses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.config import default_config, resolve
from steerjax.errors import ConfigError
from steerjax.models.attention.backends import choose
from steerjax.models.attention.blockwise import block_plan
from steerjax.models.attention.cudnn import CudnnPlan, cudnn_attention, cudnn_plan
from steerjax.models.attention.mask import Layout, allowed, attend
from steerjax.models.attention.splash import splash_attention, splash_block, splash_plan
from steerjax.training.task import attention_backend

# Rows of 256: (segment, branch, tokens). Branches stand in the middle of their prompt, one segment crosses the blocks
# of 128, one row is full, one ends in padding.
ROWS = (
    ((1, 0, 40), (1, 1, 20), (1, 2, 10), (1, 0, 30), (1, 3, 50), (2, 0, 30), (2, 1, 40), (0, 0, 36)),
    ((1, 0, 90), (1, 1, 60), (1, 0, 2), (1, 2, 70), (2, 0, 34)),
)


def rows_layout(rows=ROWS) -> Layout:
    def column(i):
        return jnp.asarray([np.concatenate([[part[i]] * part[2] for part in row]) for row in rows], jnp.int32)

    return Layout(column(0), column(1))


def arrays(layout: Layout, N: int, K: int, H: int, dtype=jnp.float32):
    B, T = layout.segments.shape
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def outputs_and_gradients(attention, layout: Layout, q, k, v, weights):
    """Of real tokens; what padding gives is nobody's affair, and it must give nothing to others."""
    real = (layout.segments > 0)[:, :, None, None]

    def loss(q, k, v):
        out = jnp.where(real, attention(q, k, v), 0)
        return (out * weights).astype(jnp.float32).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize("H", [64, 128])
def test_splash_is_dense_attention(H):
    """The TPU kernel itself, interpreted."""
    layout = rows_layout()
    q, k, v, weights = arrays(layout, N=2, K=1, H=H)
    plan = splash_plan(layout)
    (_, out), gradients = outputs_and_gradients(
        partial(splash_attention, plan=plan, interpret=True), layout, q, k, v, weights
    )
    (_, dense), expected = outputs_and_gradients(
        partial(attend, mask=allowed(layout, layout)), layout, q, k, v, weights
    )
    np.testing.assert_allclose(out, dense, atol=5e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_splash_of_a_part_of_the_queries():
    """What a device of a context axis computes."""
    layout = rows_layout()
    q, k, v, _ = arrays(layout, N=2, K=1, H=64)
    out = splash_attention(q[:, 128:], k, v, splash_plan(layout, 128, 128), interpret=True)
    real = (layout.segments > 0)[:, 128:, None, None]
    np.testing.assert_allclose(out * real, attend(q, k, v, allowed(layout, layout))[:, 128:] * real, atol=2e-6)


def test_splash_skips_the_blocks_that_blockwise_skips():
    """Also where a segment's branches are a block and more apart, and in the padding."""
    parts = ((1, 0, 128), (1, 1, 256), (1, 2, 128), (2, 0, 100), (2, 1, 28), (0, 0, 256))
    layout = rows_layout((parts,))
    kinds = np.asarray(splash_plan(layout).forward.kinds)[0, 0]
    assert splash_block(layout.segments.shape[1]) == 128 == layout.segments.shape[1] // len(kinds)
    plan = block_plan(layout, 128)
    visited = {(i, int(j)) for i in range(7) for j in plan.keys[0, i, : plan.counts[0, i]]}
    assert {(int(i), int(j)) for i, j in np.argwhere(kinds)} == visited
    assert visited == {(i, i) for i in range(7)} | {(1, 0), (2, 0), (2, 1), (3, 0)}
    assert {(int(i), int(j)) for i, j in np.argwhere(kinds == 2)} == {(1, 0), (2, 0), (2, 1), (3, 0)}  # no mask needed


@pytest.mark.parametrize("part", [(0, 256), (128, 128)])
def test_the_arguments_for_cudnn_mean_the_mask(part):
    """The same call as on a GPU, by the other implementation of jax.nn.dot_product_attention."""
    layout, (start, length) = rows_layout(), part
    q, k, v, weights = arrays(layout, N=4, K=2, H=16)
    plan = cudnn_plan(layout, start, length, jnp.bfloat16)
    assert plan.bias.dtype == jnp.bfloat16
    queries, mask = layout.part(start, length), allowed(layout, layout)[:, start : start + length]
    cut = [x[:, start : start + length] for x in (q, weights)]

    def call(q, k, v):
        return cudnn_attention(q, k, v, CudnnPlan(plan.bias.astype(q.dtype)), implementation="xla")

    (_, out), gradients = outputs_and_gradients(call, queries, cut[0], k, v, cut[1])
    (_, dense), expected = outputs_and_gradients(partial(attend, mask=mask), queries, cut[0], k, v, cut[1])
    np.testing.assert_allclose(out, dense, atol=5e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
def test_cudnn_is_dense_attention():
    layout = rows_layout()
    q, k, v, weights = arrays(layout, N=4, K=2, H=64, dtype=jnp.bfloat16)
    plan = cudnn_plan(layout)
    (_, out), gradients = outputs_and_gradients(partial(cudnn_attention, plan=plan), layout, q, k, v, weights)
    (_, dense), expected = outputs_and_gradients(
        partial(attend, mask=allowed(layout, layout)), layout, q, k, v, weights
    )
    for ours, theirs in zip((out, *gradients), (dense, *expected), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, theirs)), atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "context", "name", "why"),
    [
        ("cpu", "float32", 64, 1024, 1, "blockwise", ""),
        ("cpu", "float32", 64, 1024, 4, "blockwise", ""),
        ("cpu", "float32", 64, 1000, 1, "chunked", "attention_chunk 256 is no divisor of a device's 1000 tokens"),
        ("cpu", "float32", 64, 1024, -1, "chunked", "mesh.context -1 is no divisor"),
        ("tpu", "bfloat16", 64, 4096, 1, "splash", ""),
        ("tpu", "bfloat16", 64, 4096, 2, "splash", ""),
        ("tpu", "bfloat16", 64, 320, 1, "chunked", "a device's 320 tokens of a row are no multiple of 128"),
        ("tpu", "bfloat16", 64, 32768, 1, "chunked", "too large"),
        ("gpu", "bfloat16", 128, 4096, 1, "cudnn", ""),
        ("gpu", "float32", 128, 4096, 1, "chunked", "it computes in bfloat16, not in float32"),
        ("gpu", "bfloat16", 20, 4096, 1, "chunked", "head size 20"),
    ],
)
def test_auto_takes_the_machines_back_end_or_says_why_not(platform, dtype, head_dim, length, context, name, why):
    choice = choose(platform, dtype, head_dim, length, 256, context)
    assert choice.name == name
    assert choice.reason
    assert why in choice.reason


def test_a_back_end_that_cannot_run_this_is_refused():
    config = default_config()
    config.compute.attention = "splash"
    assert attention_backend(resolve(config.to_dict()), "tpu").name == "splash"
    with pytest.raises(ConfigError, match=r"compute\.attention is 'splash': it runs on TPU, not on cpu; cure"):
        attention_backend(resolve(config.to_dict()), "cpu")
    config.compute.attention = "blockwise"
    config.batch.row_length = 1000
    with pytest.raises(ConfigError, match="attention_chunk 256 is no divisor of a device's 1000 tokens"):
        attention_backend(resolve(config.to_dict()), "cpu")
