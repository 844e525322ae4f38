"""`until` means ancestors, and every back end is attention over them, forward and backward."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerjax.models.attention import Cache, Window, cached_attention, seen_mean
from steerjax.models.attention.mask import allowed
from tests.models.attention.forests import (
    NAMES,
    Node,
    arrays,
    assert_equal,
    attention,
    by_definition,
    kernels_anywhere,
    lay_out,
    random_rows,
    trees,
    values_and_gradients,
)

T = 256
Q, K, V, WEIGHTS = arrays(2, T, N=4, K=2, H=16)
CASES = [*((name, 64) for name in NAMES), ("blockwise", 16), ("blockwise", 256), ("chunked", 100)]
ATTENTIONS = {case: functools.partial(attention, *case) for case in CASES}  # one object a case: compiled twice


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forest=st.lists(trees(depth=6, longest=20), max_size=12), reach=st.sampled_from([None, 2, 3, 40]))
def test_until_is_the_mask_of_ancestors_with_every_back_end(monkeypatch, forest, reach):
    """Forests of depth up to 6, beside one tree; what they leave of the row is padding. With and without a window."""
    kernels_anywhere(monkeypatch)
    rows = lay_out(forest, T), lay_out([Node(100, (Node(50), Node(70)))], T)
    until, mask = (np.stack(x) for x in zip(*rows, strict=True))
    np.testing.assert_array_equal(allowed(until), mask)
    np.testing.assert_array_equal(allowed(until, 64, 100), mask[:, 64:164])
    assert (until - np.arange(T)).sum() == mask.sum()  # how FLOPs are counted
    window, positions = None, mask.sum(-1) - 1
    if reach:
        window = Window(positions, positions + reach)
        mask = mask & (positions[:, :, None] - positions[:, None] < reach)
        np.testing.assert_array_equal(allowed(until, 64, 100, window), mask[:, 64:164])
    expected = values_and_gradients(by_definition, Q, K, V, WEIGHTS, mask)
    for case in CASES:
        assert_equal(values_and_gradients(ATTENTIONS[case], Q, K, V, WEIGHTS, (until, window)), expected)


@pytest.mark.parametrize("chunk", [7, 40, 256])
def test_the_mean_of_what_is_seen(chunk):
    until, mask, _ = random_rows(2, 100, longest=9, padding=30)
    hidden, weights = arrays(2, 100, N=8, K=1, H=1)[::3]
    hidden, weights = hidden[..., 0].astype(jnp.bfloat16), weights[..., 0]

    def loss(hidden):
        means = seen_mean(hidden, until, chunk)
        return (means * weights).sum(), means

    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(hidden).compile()
    gradient, means = compiled(hidden)
    share = mask / mask.sum(-1, keepdims=True)
    assert means.dtype == jnp.float32
    assert_equal([means], [share @ np.asarray(hidden, np.float32)])
    expected = np.asarray(share.swapaxes(1, 2) @ np.asarray(weights))
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, rtol=0.01, atol=0.01)  # bfloat16's
    arrays_held = re.findall(r"(?:f32|pred|s32)\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(int(size) for size in shape.split(",")) for shape in arrays_held)
    assert (largest < mask.size) == (chunk < 100)  # no pair of the whole row is held, in the backward pass neither


@pytest.mark.parametrize("chunk", [8, 256])
@pytest.mark.parametrize("cached", [0, 20])
def test_new_tokens_after_cached_ones(cached, chunk):
    _, mask, _ = random_rows(2, 33, longest=9)
    q, k, v, _ = arrays(2, 33, N=4, K=2, H=8)
    old, new = ([x[:, part] for x in (q, k, v)] for part in (slice(cached), slice(cached, None)))
    out = cached_attention(*new, Cache(*old[1:]), mask[:, cached:], chunk)
    assert_equal([out], [by_definition(q, k, v, mask)[:, cached:]])
