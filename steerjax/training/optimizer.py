"""AdamW without its learning rate, which `train_step` takes from the schedule at the state's step."""

from __future__ import annotations

import jax
import optax

from steerjax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay; updates are to be scaled by minus the learning rate."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(parameters):
    """True for matrices. Norms and biases are told by name: a scan stacks them, so rank says nothing."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias", "reward_bias"), parameters
    )
