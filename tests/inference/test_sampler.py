"""Which tokens may be drawn, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from steerjax.errors import ConfigError
from steerjax.inference.sampler import candidates, draw, nucleus
from steerjax.inference.steering import Sampling
from steerjax.typed import typed
from tests.refusals import refused

pytestmark = pytest.mark.short


def sorted_nucleus(p, top_p):
    """The definition: most likely first, equal ones by number, until the sum reaches top_p."""
    order = np.argsort(-p, kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order], dtype=np.float64), top_p)) + 1
    keep = np.zeros(len(p), bool)
    keep[order[:count]] = True
    return keep


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.75, 0.97])
def test_nucleus_equals_sorting(size, top_p):
    find = jax.jit(nucleus, static_argnums=1)
    for seed in range(5):
        p = np.random.default_rng(seed).dirichlet(np.full(size, 0.3)).astype(np.float32)
        np.testing.assert_array_equal(find(p, top_p), sorted_nucleus(p, top_p))


def test_ties_go_to_the_lower_id():
    p = np.array([0.125, 0.25, 0.125, 0.25, 0.125, 0.125], np.float32)
    np.testing.assert_array_equal(nucleus(p, 0.3), [False, True, False, True, False, False])
    np.testing.assert_array_equal(nucleus(p, 0.6), [True, True, False, True, False, False])
    _, tokens = candidates(jnp.log(p), Sampling(1.0, top_k=3))
    assert tokens.tolist() == [1, 3, 0]
    assert draw(jnp.log(p)[None], jax.random.split(jax.random.key(0), 1), 0, Sampling()) == 1


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.5, top_k=8, top_p=0.9)]
)
def test_frequencies_are_the_softmax(sampling):
    """Chi-square over 20000 draws at several places of one text."""
    V, n = 12, 20_000
    logits = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        p = np.where(p >= np.sort(p)[-sampling.top_k], p, 0)
    p /= p.sum()
    if sampling.top_p < 1:
        p = np.where(sorted_nucleus(p, sampling.top_p), p, 0)
    p /= p.sum()
    keys = jax.vmap(jax.random.key)(np.random.default_rng(3).integers(2**31, size=n, dtype=np.int32))
    tokens = jax.jit(lambda k: draw(jnp.broadcast_to(logits, (n, V)), k, 5, sampling))(keys)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[p == 0].any()
    assert stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 0.01
    assert (p > 0).sum() > 1


@pytest.mark.parity
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.9), (20, 0.8)])
def test_the_same_tokens_as_transformers(top_k, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    sampling = Sampling(0.8, top_k=top_k, top_p=top_p)
    logits = np.random.default_rng(2).normal(0, 2, (20, 300)).astype(np.float32)
    scores = TemperatureLogitsWarper(0.8)(None, torch.tensor(logits))
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    for row, expected in zip(logits, scores.numpy(), strict=True):
        chosen, tokens = candidates(jnp.asarray(row), sampling)
        ours = np.full(300, -np.inf, np.float32)
        ours[np.asarray(tokens)] = chosen
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 0), ("top_k", -1), ("seed", 2**31), ("seed", 0.5)]
)
def test_values_out_of_range(name, value):
    with refused(ConfigError, f"options.{name}", str(value)):
        typed(Sampling, {name: value}, "options", ConfigError)
