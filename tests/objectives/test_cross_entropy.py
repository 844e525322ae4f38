"""The chunked cross-entropy equals the plain one, on one device and on eight, and never holds a row's logits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from steerjax.models.config import LlamaConfig
from steerjax.models.llama import CausalLM, Compute
from steerjax.objectives.cross_entropy import chunked_cross_entropy
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.parallel.rules import partition_spec
from tests.helpers import assert_trees_close

B, T, D, V = 8, 40, 24, 96


def arrays(dtype=np.float32, tied=True):
    random = np.random.default_rng(0)
    states = jnp.asarray(random.normal(size=(B, T, D)), dtype)
    kernel = random.normal(size=(V, D) if tied else (D, V)).astype(np.float32)
    targets = random.integers(0, V, (B, T)).astype(np.int32)
    weights = random.choice([0, 0, 1, 0.25], (B, T)).astype(np.float32)
    weights[0] = 0  # a row without a trained token
    return states, jnp.asarray(kernel), targets, weights


def head_of(kernel, tied=True):
    def head(states):
        matrix = kernel.T if tied else kernel
        return jnp.matmul(states, matrix.astype(states.dtype), preferred_element_type=jnp.float32)

    return head


def plain(states, head, targets, weights):
    """All logits at once, and log_softmax instead of optax."""
    logits = head(states).astype(jnp.float32)
    likelihoods = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, V), axis=-1)
    right = jnp.argmax(logits, axis=-1) == targets
    return -(weights * likelihoods).sum(), weights.sum(), (weights * right).sum()


def mean_loss(cross_entropy, tied, targets, weights):
    """(loss, (count, right)) as a function of states and kernel; the loss is divided, as in training."""

    def loss(states, kernel):
        total, count, right = cross_entropy(states, head_of(kernel, tied), targets, weights)
        return total / count, (count, right)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def chunked(chunk):
    return lambda *arguments: chunked_cross_entropy(*arguments, chunk)


@pytest.mark.short
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 8, 40, 1000])
def test_equals_the_plain_computation(tied, chunk):
    states, kernel, targets, weights = arrays(tied=tied)
    targets[1, :20] = np.argmax(head_of(kernel, tied)(states)[1, :20], axis=-1)  # some are right
    expected = mean_loss(plain, tied, targets, weights)(states, kernel)
    actual = mean_loss(chunked(chunk), tied, targets, weights)(states, kernel)
    assert expected[0][1][1] > 3
    assert_trees_close(actual, expected, rtol=1e-6)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(actual))
    value = jax.jit(lambda s, k: chunked(chunk)(s, head_of(k, tied), targets, weights))(states, kernel)  # no gradient
    np.testing.assert_allclose(value, plain(states, head_of(kernel, tied), targets, weights), rtol=1e-6)


def test_bfloat16_states():
    states, kernel, targets, weights = arrays(jnp.bfloat16)
    expected = mean_loss(plain, True, targets, weights)(states, kernel)
    actual = mean_loss(chunked(8), True, targets, weights)(states, kernel)
    assert_trees_close(actual[0], expected[0], rtol=1e-6)
    assert [x.dtype for x in actual[1]] == [jnp.bfloat16, jnp.float32]
    assert_trees_close(*(jax.tree.map(lambda x: x.astype(jnp.float32), g[1]) for g in (actual, expected)), rtol=2**-7)


def test_a_kernel_in_bfloat16_loses_nothing_by_the_number_of_chunks():
    """As micro-batches have it: a gradient is added up in float32, and rounded once."""
    states, kernel, targets, weights = arrays(jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16)
    exact = mean_loss(plain, True, targets, weights)(states, kernel.astype(jnp.float32))[1][1]
    found = [mean_loss(chunked(chunk), True, targets, weights)(states, kernel)[1][1] for chunk in (T, 1)]
    assert {gradient.dtype for gradient in found} == {jnp.dtype(jnp.bfloat16)}
    one, many = (float(jnp.abs(gradient.astype(jnp.float32) - exact).mean()) for gradient in found)
    assert many < 1.25 * one


@pytest.mark.short
def test_nothing_trained_is_zero_over_zero_never_nan():
    states, kernel, targets, weights = arrays()
    total = jax.value_and_grad(lambda s: chunked(8)(s, head_of(kernel), targets, 0 * weights)[0])
    value, gradient = total(states)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(states))
    assert chunked(8)(states, head_of(kernel), targets, 0 * weights)[1:] == (0, 0)


def test_the_logits_of_a_row_never_exist():
    """The largest array of loss and gradients, in the program as traced: one chunk's logits, or the states."""
    states, kernel, targets, weights = arrays()

    def largest(cross_entropy):
        traced = str(jax.make_jaxpr(mean_loss(cross_entropy, True, targets, weights))(states, kernel))
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r":\w+\[([\d,]+)\]", traced))

    assert largest(plain) == B * T * V
    assert largest(chunked(8)) == B * T * D
    assert largest(chunked(20)) == B * 20 * V


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [(1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1)], ids=str)
def test_eight_devices_equal_one(tied, sizes):
    states, kernel, targets, weights = arrays(tied=tied)
    step = mean_loss(chunked(8), tied, targets, weights)
    expected = step(states, kernel)
    mesh = make_mesh(MeshConfig(*sizes))
    axes = ("vocab", "embed") if tied else ("embed", "vocab")
    shardings = [NamedSharding(mesh, partition_spec(a)) for a in (("batch", "length", "activation_embed"), axes)]
    with jax.set_mesh(mesh):
        sharded = jax.jit(step, in_shardings=shardings, out_shardings=(None, tuple(shardings)))
        text = sharded.lower(states, kernel).compile().as_text()
        actual = jax.device_get(sharded(states, kernel))
    assert_trees_close(actual, expected, rtol=1e-5)
    data, fsdp, tensor, context = sizes
    assert f"f32[{B // (data * fsdp)},{8 // context},{V // tensor}]" in text  # a device's share of a chunk's logits
    assert f",{V}]" not in text  # nothing holds the whole vocabulary
    assert not re.search("(all-to-all|collective-permute)(-start)?\\(", text)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    assert all(len(shape.split(",")) == 2 for shape in gathered)  # the kernel over fsdp; never tokens


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers_loss(tied):
    """Prompts at -100; value and the gradient of the head (tied: of the embedding, through both of its uses)."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.models.test_parity import BASE, from_torch, hf_config, randomize

    config = LlamaConfig(**BASE, num_kv_heads=2, tie_word_embeddings=tied)
    theirs = randomize(LlamaForCausalLM(hf_config(config, attn_implementation="eager")), seed=0)
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (3, 24))
    trained = random.random((3, 24)) < 0.5
    trained[:, :4] = False
    loss = theirs(torch.tensor(tokens), labels=torch.tensor(np.where(trained, tokens, -100))).loss
    loss.backward()

    llama, weights = from_torch(theirs, config)
    params = {"llama": llama} | ({} if tied else {"lm_head": weights["lm_head.weight"].T})
    model, until = CausalLM(config, Compute(chunk=8)), np.full((3, 24), 24)
    targets, next_trained = (np.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, trained))

    def ours(params):
        states = model.apply({"params": params}, tokens, np.arange(24)[None].repeat(3, 0), until, method="hidden")
        head = lambda x: model.apply({"params": params}, x, method="head")  # noqa: E731
        total, count, _ = chunked_cross_entropy(states, head, targets, next_trained, 5)
        return total / count

    value, gradient = jax.value_and_grad(ours)(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    pairs = [(gradient["llama"]["embedding"], theirs.model.embed_tokens.weight.grad)]
    pairs += [] if tied else [(gradient["lm_head"].T, theirs.lm_head.weight.grad)]
    for actual, expected in pairs:
        assert_trees_close(actual, expected.numpy(), rtol=1e-5)
