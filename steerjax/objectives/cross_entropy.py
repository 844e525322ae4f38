"""Cross-entropy over a vocabulary, its logits held for one chunk of tokens at a time.

Source of the objective: SteerLM, arXiv 2310.05344, section 3.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from steerjax.parallel.rules import constrain


def chunked_cross_entropy(
    states: Float[Array, "B T D"],
    head: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sums in float32: of the negative log likelihoods, of the weights, of the weights of likeliest targets.

    The first over the second is the loss, after micro-batches and devices are added up; the third over the second is
    the accuracy. The gradient of a chunk is taken in the forward pass, while its logits are there, so they are
    computed once; the parameters that `head` closes over get theirs.

    `targets` are the tokens after each token, any id where the weight is 0; weights are constants. A chunk is at most
    `chunk` tokens of each row.
    """
    chunks = -(-states.shape[1] // chunk)

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [chunks, B, C, ...]. Tokens of a chunk lie `chunks` apart: each `context` device has some."""
        B, T, *rest = x.shape
        x = jnp.pad(x, ((0, 0), (0, -T % chunks), *((0, 0) for _ in rest)))
        return jnp.moveaxis(x.reshape(B, -1, chunks, *rest), 2, 0)

    parts = cut(states), cut(targets), cut(jax.lax.stop_gradient(weights).astype(jnp.float32))
    pure_head, parameters = jax.closure_convert(head, parts[0][0])
    return _sums(pure_head, parameters, *parts)


_ZEROS = 0.0, (0.0, 0.0)


def _chunk_sums(head, parameters, states, targets, weights):
    logits = constrain(head(states, *parameters).astype(jnp.float32), "batch", "length", "vocab")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    right = of_target == logits.max(-1)  # cheaper than argmax; optax has computed both
    return (weights * losses).sum(), (weights.sum(), (weights * right).sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(head, parameters, states, targets, weights):
    def add(sums, part):
        return jax.tree.map(jnp.add, sums, _chunk_sums(head, parameters, *part)), None

    (total, counts), _ = jax.lax.scan(add, _ZEROS, (states, targets, weights))
    return total, *counts


def _sums_and_gradients(head, parameters, states, targets, weights):
    differentiate = jax.value_and_grad(_chunk_sums, argnums=(1, 2), has_aux=True)

    def add(carry, part):
        sums, (of_parameters, of_states) = differentiate(head, parameters, *part)
        return jax.tree.map(jnp.add, carry, (sums, of_parameters)), of_states

    start = _ZEROS, jax.tree.map(jnp.zeros_like, parameters)
    ((total, counts), of_parameters), of_states = jax.lax.scan(add, start, (states, targets, weights))
    return (total, *counts), (of_parameters, of_states)


def _scaled_gradients(head, gradients, cotangents):
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
    return *scaled, None, None


_sums.defvjp(_sums_and_gradients, _scaled_gradients)
