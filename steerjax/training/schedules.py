"""Learning rate by step, as pure functions; `step` counts finished updates, from 0.

Source: NeMo `nemo/core/optim/lr_scheduler.py`, with golden values in the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steerjax.errors import ConfigError
from steerjax.training.config import OptimizerConfig

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """`constant`: linear warm-up, then learning_rate. `cosine`: warm-up, cosine, constant_steps at the minimum.

    Args:
        steps: of the whole run.

    Raises:
        ConfigError: warm-up and constant steps leave no step for the cosine.
    """
    peak, low, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    decay = steps - warmup - config.constant_steps
    if config.schedule == "constant":
        return lambda step: peak * jnp.minimum(1.0, (step + 1) / (warmup + 1))
    if decay < 1:
        raise ConfigError(
            f"{steps} steps are all taken by config.optimizer.warmup_steps {warmup} and constant_steps "
            f"{config.constant_steps}; cure: fewer of them, or more steps"
        )

    def cosine(step):
        done = jnp.clip((step - warmup) / decay, 0.0, 1.0)
        if config.constant_steps:  # the reference starts from 0 here, and from peak / (warmup + 1) otherwise
            rising = peak * step / max(warmup, 1)
        else:
            rising = peak * (step + 1) / (warmup + 1)
        falling = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step <= warmup, jnp.minimum(rising, peak) if warmup else peak, falling)

    return cosine
