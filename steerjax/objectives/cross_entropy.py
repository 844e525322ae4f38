"""Cross-entropy over a vocabulary, of trained tokens alone, its logits held for one chunk of tokens at a time.

Source of the objective: SteerLM, arXiv 2310.05344, section 3.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steerjax.models.logits import cut, target_losses
from steerjax.parallel.rules import RULES, mesh_ways


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
    `chunk` tokens of each row. Tokens with a weight come first, and a chunk without any is skipped.
    """
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    order = _trained_first(weights, chunk)
    parts = tuple(cut(_taken(x, order), chunk) for x in (states, targets, weights))
    pure_head, parameters = jax.closure_convert(head, parts[0][0])
    return _sums(pure_head, parameters, *parts)


def _trained_first(weights: Float[Array, "B T"], chunk: int) -> Int[Array, "B S P"]:
    """Which token comes to each place, so that `cut` has those with a weight in its first chunks.

    Rows are in S parts of P tokens, one for each `context` device, and no token leaves its part.
    """
    B, T = weights.shape
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh_ways(mesh, RULES["length"])
    places = np.arange(T).reshape(ways, -1)
    chunks = places % -(-T // chunk)
    ranks = np.argsort(np.lexsort((places, chunks), axis=-1), axis=-1)  # of each place in the order of chunks
    by_weight = jnp.argsort(weights.reshape(B, ways, -1) == 0, axis=-1, stable=True)
    return jnp.take_along_axis(by_weight, ranks[None], axis=-1)


def _taken(x: Array, order: Int[Array, "B S P"]) -> Array:
    """The tokens of [B, T, ...] in this order."""
    apart = x.reshape(*order.shape, *x.shape[2:])
    order = order.reshape(*order.shape, *(1 for _ in x.shape[2:]))
    return jnp.take_along_axis(apart, order, axis=2).reshape(x.shape)


_ZEROS = 0.0, (0.0, 0.0)


def _chunk_sums(head, parameters, states, targets, weights):
    losses, right = target_losses(head, states, targets, parameters)
    return (weights * losses).sum(), (weights.sum(), (weights * right).sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(head, parameters, states, targets, weights):
    def add(sums, part):
        def more(sums):
            return jax.tree.map(jnp.add, sums, _chunk_sums(head, parameters, *part))

        return jax.lax.cond(part[2].any(), more, lambda sums: sums, sums), None

    (total, counts), _ = jax.lax.scan(add, _ZEROS, (states, targets, weights))
    return total, *counts


def _sums_and_gradients(head, parameters, states, targets, weights):
    differentiate = jax.value_and_grad(_chunk_sums, argnums=(1, 2), has_aux=True)

    def add(carry, part):
        def more(carry):
            sums, (of_parameters, of_states) = differentiate(head, parameters, *part)
            return jax.tree.map(jnp.add, carry, (sums, of_parameters)), of_states

        return jax.lax.cond(part[2].any(), more, lambda carry: (carry, jnp.zeros_like(part[0])), carry)

    # Parameters may be in the compute dtype, and a sum over chunks in bfloat16 would lose what is small beside it.
    start = _ZEROS, jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), parameters)
    ((total, counts), of_parameters), of_states = jax.lax.scan(add, start, (states, targets, weights))
    of_parameters = jax.tree.map(lambda sum, p: sum.astype(p.dtype), of_parameters, parameters)
    return (total, *counts), (of_parameters, of_states)


def _scaled_gradients(head, gradients, cotangents):
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
    return *scaled, None, None


_sums.defvjp(_sums_and_gradients, _scaled_gradients)
