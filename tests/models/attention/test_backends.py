"""The kernels for TPU and GPU by themselves, and what `auto` chooses."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.errors import ConfigError
from steerjax.models.attention import choose_backend
from steerjax.models.attention.kernels import cudnn_attention, cudnn_bias, splash_attention, splash_plan
from steerjax.models.attention.mask import allowed
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
from tests.refusals import refused


@pytest.mark.parametrize("H", [64, 128])
def test_splash_equals_the_definition(H):
    """The TPU kernel itself, interpreted, over several blocks."""
    until, mask, _ = random_rows(2, 384, longest=90, padding=50)
    q, k, v, weights = arrays(2, 384, N=2, K=1, H=H)

    def splash(q, k, v, until):
        return splash_attention(q, k, v, splash_plan(allowed(until)), interpret=True)

    ours = values_and_gradients(splash, q, k, v, weights, until)
    assert_equal(ours, values_and_gradients(by_definition, q, k, v, weights, mask))


@pytest.mark.parametrize(("start", "length"), [(0, 640), (128, 384)])
def test_splash_skips_exactly_the_blocks_without_an_allowed_pair(start, length):
    """And masks no full one; also where branches are a block and more apart, and in the padding."""
    tree = Node(128, (Node(256), Node(28, (Node(50), Node(50)))))
    forests = [(tree,), (Node(100, (Node(156), Node(300))),), (Node(640),)]
    rows = [lay_out(forest, 640) for forest in forests]
    until = jnp.asarray(np.stack([until for until, _ in rows]))
    forward, backward = splash_plan(allowed(until, start, length))
    for row, (_, mask) in enumerate(rows):
        kinds = block_kinds(mask[start : start + length], 128)
        np.testing.assert_array_equal(forward.block_mask[row, 0], kinds)
        assert {0, 1} <= set(kinds.flat)
        # Backward the kernel goes over the queries of a block of keys, and its blocks lie as forward.
        np.testing.assert_array_equal(backward.block_mask[row, 0], kinds)


@pytest.mark.parametrize(("start", "length"), [(0, 256), (128, 128)])
def test_the_arguments_for_cudnn_mean_the_mask(start, length):
    """The same call as on a GPU, by the other implementation of jax.nn.dot_product_attention."""
    until, mask, _ = random_rows(2, 256, longest=60, padding=40)
    q, k, v, weights = arrays(2, 256, N=4, K=2, H=16)
    q, weights = (x[:, start : start + length] for x in (q, weights))
    assert cudnn_bias(allowed(until)).dtype == jnp.bfloat16

    def cudnn(q, k, v, until):
        return cudnn_attention(q, k, v, cudnn_bias(allowed(until, start, length), q.dtype), implementation="xla")

    ours = values_and_gradients(cudnn, q, k, v, weights, until)
    assert_equal(ours, values_and_gradients(by_definition, q, k, v, weights, mask[:, start : start + length]))


@pytest.mark.skipif(os.environ.get("STEERJAX_TEST_PLATFORM") != "cuda", reason="needs STEERJAX_TEST_PLATFORM=cuda")
@pytest.mark.parametrize("name", ["triton", "cudnn"])
def test_kernels_equal_the_definition_on_a_gpu(name):
    until, mask, real = random_rows(2, 256, longest=60, padding=40)
    q, k, v, weights = arrays(2, 256, N=4, K=2, H=64, dtype=jnp.bfloat16)
    weights = weights * real[:, :, None, None]
    ours = values_and_gradients(functools.partial(attention, name, 64), q, k, v, weights, until)
    expected = values_and_gradients(by_definition, *(x.astype(jnp.float32) for x in (q, k, v, weights)), mask)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "context", "name", "why"),
    [
        ("cpu", "float32", 64, 1024, 1, "blockwise", ""),
        ("cpu", "float32", 64, 1024, 4, "blockwise", ""),
        ("cpu", "float32", 64, 1000, 1, "chunked", "attention_chunk 256"),
        ("cpu", "float32", 64, 1024, 3, "chunked", "mesh.context 3"),
        ("tpu", "bfloat16", 64, 4096, 1, "splash", ""),
        ("tpu", jnp.bfloat16, 64, 4096, 2, "splash", ""),
        ("tpu", "bfloat16", 64, 320, 1, "chunked", "320 tokens"),
        ("tpu", "bfloat16", 64, 32768, 1, "chunked", "too large"),
        ("gpu", "bfloat16", 128, 4096, 1, "triton", ""),
        ("gpu", jnp.float32, 128, 4096, 2, "triton", ""),
        ("gpu", "bfloat16", 20, 4096, 1, "triton", ""),
        ("gpu", "bfloat16", 128, 1000, 1, "cudnn", "1000 tokens"),
        ("gpu", "bfloat16", 8, 4096, 1, "cudnn", "head size 8"),
        ("gpu", jnp.float32, 256, 4096, 1, "chunked", "head size 256"),
    ],
)
def test_auto_takes_the_machines_back_end_or_says_why_not(platform, dtype, head_dim, length, context, name, why):
    choice = choose_backend("auto", platform, dtype, head_dim, length, 256, context)
    assert choice.name == name
    assert choice.reason
    assert why in choice.reason


@pytest.mark.parametrize(
    ("name", "platform", "length", "why"),
    [
        ("splash", "cpu", 1024, "cpu"),
        ("cudnn", "tpu", 1024, "tpu"),
        ("blockwise", "cpu", 1000, "attention_chunk 256"),
        ("splash", "tpu", 1000, "1000 tokens"),
        ("cudnn", "gpu", 1023, "1023 tokens"),
        ("triton", "gpu", 1000, "1000 tokens"),
    ],
)
def test_a_named_back_end_that_cannot_run_this_is_refused(name, platform, length, why):
    with refused(ConfigError, "config.compute.attention", name, why, cure="auto"):
        choose_backend(name, platform, "bfloat16", 64, length, 256, 1)


def test_a_named_back_end_that_can_is_taken():
    for name, platform in (("splash", "tpu"), ("triton", "gpu"), ("cudnn", "gpu"), ("chunked", "tpu")):
        assert choose_backend(name, platform, "bfloat16", 64, 1024, 256, 2).name == name


def test_the_kernels_want_a_newer_gpu(monkeypatch):
    class Volta:
        compute_capability = "7.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Volta()])
    assert "Ampere" in choose_backend("auto", "gpu", "bfloat16", 64, 1024, 256, 1).reason
