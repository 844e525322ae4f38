"""Logits over a vocabulary, never held for more than one chunk of a row's tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from steerjax.parallel.rules import constrain

Head = Callable[..., Float[Array, "B C V"]]  # states [B C D], parameters -> logits


def cut(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [chunks, B, C, ...], C at most `chunk`, zeros at the end.

    Tokens of a chunk lie `chunks` apart, so that each `context` device has some of them.
    """
    B, T, *rest = x.shape
    chunks = -(-T // chunk)
    x = jnp.pad(x, ((0, 0), (0, -T % chunks), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x.reshape(B, -1, chunks, *rest), 2, 0)


def joined(parts: Array, length: int) -> Array:
    """The inverse of `cut`, for T = `length`."""
    chunks, B, C, *rest = parts.shape
    return jnp.moveaxis(parts, 0, 2).reshape(B, C * chunks, *rest)[:, :length]


def target_losses(
    head: Head, states: Float[Array, "B C D"], targets: Int[Array, "B C"], parameters=()
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """Of each target the negative log likelihood, float32, and whether no token is likelier."""
    logits = constrain(head(states, *parameters).astype(jnp.float32), "batch", "length", "vocab")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return losses, of_target == logits.max(-1)  # cheaper than argmax; optax has computed both


def token_log_likelihoods(
    states: Float[Array, "B T D"], head: Head, targets: Int[Array, "B T"], chunk: int
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Of each place log p of its target, float32, and whether no token is likelier; any target will do where there is
    none. Logits of at most `chunk` tokens of a row exist at a time, and are kept for no gradient: there is none."""
    parts = cut(jax.lax.stop_gradient(states), chunk), cut(targets, chunk)
    head, parameters = jax.closure_convert(head, parts[0][0])
    parameters = jax.lax.stop_gradient(parameters)
    losses, right = jax.lax.map(lambda part: target_losses(head, *part, parameters), parts)
    return -joined(losses, states.shape[1]), joined(right, states.shape[1])
