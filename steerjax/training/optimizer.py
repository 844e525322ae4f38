"""AdamW without its learning rate, and which parameters it trains."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import optax

from steerjax.errors import ConfigError
from steerjax.training.config import OptimizerConfig

_LAYERS = "llama/layers/"


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay; updates are to be scaled by minus the learning rate."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(parameters):
    """True for matrices. Norms and biases are told by name: layers are stacked, so rank says nothing."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias", "reward_bias"), parameters
    )


def partition(parameters, config: OptimizerConfig):
    """(trained, frozen) parameters: two trees of the same shape, with None where the other has the whole leaf.

    With `frozen_layers` each stack of layers is cut: the first layers are in `frozen`, the others in `trained`.

    Raises:
        ConfigError: one of `config.frozen` is found in no name.
    """
    patterns = config.frozen + (("llama/embedding",) if config.frozen_layers else ())
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), parameters
    )
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in jax.tree.leaves(names)):
            known = ", ".join(jax.tree.leaves(names))
            raise ConfigError(f"config.optimizer.frozen: no parameter matches {pattern!r}; cure: one of {known}")

    def frozen(name: str, leaf) -> int:
        """How much of a leaf's first dimension is frozen."""
        if any(re.search(pattern, name) for pattern in patterns):
            return leaf.shape[0]
        return config.frozen_layers if name.startswith(_LAYERS) else 0

    sizes = jax.tree.map(frozen, names, parameters)
    trained = jax.tree.map(lambda p, n: None if n == p.shape[0] else p[n:] if n else p, parameters, sizes)
    return trained, jax.tree.map(lambda p, n: p if n == p.shape[0] else p[:n] if n else None, parameters, sizes)


def join(trained, frozen):
    """The inverse of `partition`."""

    def whole(trained, frozen):
        if trained is None or frozen is None:
            return frozen if trained is None else trained
        return jnp.concatenate([frozen, trained])  # XLA takes the parts where a model only uses the parts

    return jax.tree.map(whole, trained, frozen, is_leaf=lambda x: x is None)
