"""Golden values of the masked loss (reference facts, section 3.2)."""

import jax.numpy as jnp
import numpy as np
import pytest

from steerjax.objectives.regression import masked_squared_error

pytestmark = pytest.mark.short

# Two rows with 5 and 4 ratings: squared errors sum to 2.0 and 3.25.
PREDICTIONS = np.array([[1, 1, 0, 0, 0], [1.5, 1, 0, 0, 9]], np.float32)
RATINGS = np.zeros((2, 5), np.float32)
COUNTS = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.float32)
ONES = np.ones(5, np.float32)


def test_mean_over_ratings_and_over_examples():
    total, count = masked_squared_error(PREDICTIONS, RATINGS, COUNTS, ONES)
    assert (total, count) == (5.25, 9)
    assert float(total / count) == pytest.approx(5.25 / 9)  # 0.5833
    total, count = masked_squared_error(PREDICTIONS, RATINGS, COUNTS, ONES, "examples")
    assert count == 2
    assert float(total / count) == pytest.approx((0.4 + 0.8125) / 2)  # 0.6063


def test_sums_add_up_over_any_cut():
    """What a mean of means cannot do."""
    whole = masked_squared_error(PREDICTIONS, RATINGS, COUNTS, ONES)
    parts = [masked_squared_error(PREDICTIONS[i : i + 1], RATINGS[i : i + 1], COUNTS[i : i + 1], ONES) for i in (0, 1)]
    assert whole[0] == parts[0][0] + parts[1][0]
    assert whole[1] == parts[0][1] + parts[1][1]


def test_weights_count_in_both():
    weights = np.array([2, 0, 1, 1, 1], np.float32)
    total, count = masked_squared_error(PREDICTIONS, RATINGS, COUNTS, weights)
    assert (total, count) == (2 * 1 + 2 * 2.25, 5 + 4)


def test_a_masked_rating_reaches_neither_loss_nor_gradient():
    import jax

    poisoned = np.where(COUNTS > 0, RATINGS, np.nan)
    gradient = jax.grad(lambda p: masked_squared_error(p, poisoned, COUNTS, ONES)[0])(jnp.asarray(PREDICTIONS))
    assert gradient[1, 4] == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("average", ["ratings", "examples"])
def test_no_rating_at_all_is_zero_over_zero_never_nan(average):
    total, count = masked_squared_error(PREDICTIONS, RATINGS, np.zeros_like(COUNTS), ONES, average)
    assert (total, count) == (0, 0)


@pytest.mark.parametrize("average", ["ratings", "examples"])
def test_a_place_that_stands_for_two_examples_counts_twice(average):
    """As two equal responses with equal ratings that a tree writes once."""
    twice = masked_squared_error(PREDICTIONS, RATINGS, COUNTS * np.array([[1], [2]], np.float32), ONES, average)
    written = [np.concatenate([x, x[1:]]) for x in (PREDICTIONS, RATINGS, COUNTS)]
    np.testing.assert_allclose(twice, masked_squared_error(*written, ONES, average), rtol=1e-6)
