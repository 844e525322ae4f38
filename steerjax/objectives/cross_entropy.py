"""Cross-entropy over a vocabulary, its logits held for one chunk of tokens at a time.

Source of the objective: SteerLM, arXiv 2310.05344, section 3.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steerjax.models.logits import cut, target_losses


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
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    parts = tuple(cut(x, chunk) for x in (states, targets, weights))
    pure_head, parameters = jax.closure_convert(head, parts[0][0])
    return _sums(pure_head, parameters, *parts)


_ZEROS = 0.0, (0.0, 0.0)


def _chunk_sums(head, parameters, states, targets, weights):
    losses, right = target_losses(head, states, targets, parameters)
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
