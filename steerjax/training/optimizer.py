"""AdamW without its learning rate, which `train_step` takes from the schedule at the state's step."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import optax

from steerjax.config import OptimizerConfig
from steerjax.errors import ConfigError


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay; updates are to be scaled by minus the learning rate."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(parameters):
    """True for matrices. Norms and biases are told by name: a scan stacks them, so rank says nothing."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias", "reward_bias"), parameters
    )


def partition(parameters, frozen: Sequence[str]):
    """(trained, frozen) parameters: two trees of the same shape, each with None where the other has a leaf.

    Args:
        frozen: regular expressions over names like `llama/embedding`.

    Raises:
        ConfigError: an expression that is found in no name.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), parameters
    )
    for pattern in frozen:
        if not any(re.search(pattern, name) for name in jax.tree.leaves(names)):
            known = ", ".join(jax.tree.leaves(names))
            raise ConfigError(f"config.optimizer.frozen: no parameter matches {pattern!r}; cure: one of {known}")
    held = jax.tree.map(lambda name: any(re.search(pattern, name) for pattern in frozen), names)
    trained = jax.tree.map(lambda p, h: None if h else p, parameters, held)
    return trained, jax.tree.map(lambda p, h: p if h else None, parameters, held)


def combine(trained, frozen):
    """The inverse of `partition`."""
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)
