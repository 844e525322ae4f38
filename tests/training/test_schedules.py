"""Golden values of the reference's schedules (reference facts, section 3.5)."""

import numpy as np
import pytest

from steerjax.errors import ConfigError
from steerjax.training.config import OptimizerConfig
from steerjax.training.optimizer import decayed
from steerjax.training.schedules import make_schedule
from tests.refusals import refused

pytestmark = pytest.mark.short


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 9e-6 / 11), (5, 4.909e-6), (10, 9e-6), (11, 8.99997e-6), (400, 5.0305e-6), (800, 9e-7)],
)
def test_cosine(step, expected):
    config = OptimizerConfig(learning_rate=9e-6, min_learning_rate=9e-7, warmup_steps=10, constant_steps=0)
    np.testing.assert_allclose(make_schedule(config, 800)(step), expected, rtol=2e-4)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0), (1, 6e-6), (2, 5.999993e-6), (300, 5.5013e-6), (600, 5e-6), (800, 5e-6)]
)
def test_cosine_with_constant_steps(step, expected):
    config = OptimizerConfig(learning_rate=6e-6, min_learning_rate=5e-6, warmup_steps=1, constant_steps=200)
    np.testing.assert_allclose(make_schedule(config, 800)(step), expected, rtol=1e-5, atol=1e-12)


def test_constant():
    config = OptimizerConfig(learning_rate=2e-6, schedule="constant", warmup_steps=10)
    rates = [float(make_schedule(config, 317)(step)) for step in (0, 5, 10, 11, 316)]
    np.testing.assert_allclose(rates, [2e-6 / 11, 2e-6 * 6 / 11, 2e-6, 2e-6, 2e-6], rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    for constant_steps in (0, 3):
        config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, constant_steps=constant_steps)
        np.testing.assert_allclose(make_schedule(config, 10)(0), 1e-3, rtol=1e-6)


def test_constant_steps_that_leave_no_decay_are_refused():
    """The reference falls to the minimum at once (its fault F11)."""
    config = OptimizerConfig(warmup_steps=10, constant_steps=1000)
    with refused(ConfigError, "800 steps", "10", "1000", cure="more steps"):
        make_schedule(config, 800)


def test_norms_and_biases_do_not_decay():
    tree = {"norm": {"scale": 0}, "q": {"kernel": 0, "bias": 0}, "embedding": 0, "reward_head": 0, "reward_bias": 0}
    assert decayed(tree) == {
        "norm": {"scale": False}, "q": {"kernel": True, "bias": False}, "embedding": True, "reward_head": True,
        "reward_bias": False,
    }  # fmt: skip
