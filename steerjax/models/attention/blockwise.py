"""Attention that computes only the blocks the mask allows, in plain JAX.

For packed rows most of the score matrix is forbidden: other segments, other branches, the future. The blocks that
hold an allowed pair are known once the batch is there; loops with that many turns visit them, forward with a running
softmax and backward from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steerjax.models.attention.mask import Layout, allowed

NEGATIVE = -1e30  # finite: a block may hold no key for a query, and inf - inf is NaN


class BlockPlan(NamedTuple):
    """For each block of queries, the blocks of keys with an allowed pair. n is T / block, m is S / block.

    Attributes:
        queries: number of the block in its row.
        keys: block numbers, ascending; the first `counts` are meant.
        counts: how many.
    """

    queries: Int[Array, "B n"]
    keys: Int[Array, "B n m"]
    counts: Int[Array, "B n"]


def block_plan(layout: Layout, block: int, start: int | Int[Array, ""] = 0, length: int | None = None) -> BlockPlan:
    """Which blocks to visit; the same for all layers of a model.

    Args:
        start, length: of the queries in their rows; all by default. Multiples of `block`, as S is.
    """
    B, S = layout.segments.shape
    queries = layout.part(start, length or S)
    n, m = queries.segments.shape[1] // block, S // block
    numbers = start // block + jnp.arange(n)
    # Padding sees padding in `allowed`, so that no softmax is empty; its own diagonal block is enough for that.
    real = allowed(queries, layout, offset=start) & (queries.segments > 0)[:, :, None]
    active = real.reshape(B, n, block, m, block).any((2, 4)) | (numbers[:, None] == jnp.arange(m))
    keys = jnp.argsort(~active, axis=-1, stable=True)
    return BlockPlan(*(x.astype(jnp.int32) for x in (jnp.broadcast_to(numbers, (B, n)), keys, active.sum(-1))))


class _Grouped(NamedTuple):
    """One row in blocks, query heads grouped by their key-value head."""

    q: Float[Array, "n K Gb H"]  # G query heads times b tokens
    k: Float[Array, "m K b H"]
    v: Float[Array, "m K b H"]
    segments: Int[Array, "m b"]
    branches: Int[Array, "m b"]


def _block_mask(row: _Grouped, number: Int[Array, ""], j: Int[Array, ""], groups: int) -> Bool[Array, "Gb b"]:
    b = row.segments.shape[1]
    queries, keys = (Layout(row.segments[x][None], row.branches[x][None]) for x in (number, j))
    return jnp.tile(allowed(queries, keys, offset=(number - j) * b)[0], (groups, 1))


def _scores(row: _Grouped, plan: BlockPlan, i, j, scale: float, groups: int) -> Float[Array, "K Gb b"]:
    scores = jnp.einsum("KQH,KSH->KQS", row.q[i], row.k[j], preferred_element_type=jnp.float32) * scale
    return jnp.where(_block_mask(row, plan.queries[i], j, groups)[None], scores, NEGATIVE)


def _forward_row(row: _Grouped, plan: BlockPlan, scale: float, groups: int):
    """Output [n, K, Gb, H] and log-sum-exp [n, K, Gb] of one row."""
    n, K, Gb, H = row.q.shape

    def queries(i):
        def visit(place, carry):
            peak, total, out = carry
            j = plan.keys[i, place]
            scores = _scores(row, plan, i, j, scale, groups)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            shrink = jnp.exp(peak - new_peak)
            total = total * shrink + weights.sum(-1)
            values = jnp.einsum("KQS,KSH->KQH", weights.astype(row.v.dtype), row.v[j],
                                preferred_element_type=jnp.float32)  # fmt: skip
            return new_peak, total, out * shrink[..., None] + values

        start = (jnp.full((K, Gb), NEGATIVE), jnp.zeros((K, Gb)), jnp.zeros((K, Gb, H)))
        peak, total, out = jax.lax.fori_loop(0, plan.counts[i], visit, start)
        return (out / total[..., None]).astype(row.q.dtype), peak + jnp.log(total)

    return jax.lax.map(queries, jnp.arange(n))


def _backward_row(row: _Grouped, plan: BlockPlan, out, logsumexp, gradient, scale: float, groups: int):
    """Gradients of q, k, v of one row, in blocks."""
    n, K, Gb, H = row.q.shape
    overlap = jnp.einsum("nKQH,nKQH->nKQ", out, gradient, preferred_element_type=jnp.float32)

    def queries(carry, i):
        def visit(place, carry):
            dq, dk, dv = carry
            j = plan.keys[i, place]
            weights = jnp.exp(_scores(row, plan, i, j, scale, groups) - logsumexp[i][..., None])
            dweights = jnp.einsum("KQH,KSH->KQS", gradient[i], row.v[j], preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - overlap[i][..., None]) * scale).astype(row.q.dtype)
            weights = weights.astype(row.q.dtype)
            f32 = {"preferred_element_type": jnp.float32}
            dq = dq + jnp.einsum("KQS,KSH->KQH", dscores, row.k[j], **f32)
            dk = dk.at[j].add(jnp.einsum("KQS,KQH->KSH", dscores, row.q[i], **f32))
            dv = dv.at[j].add(jnp.einsum("KQS,KQH->KSH", weights, gradient[i], **f32))
            return dq, dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, plan.counts[i], visit, (jnp.zeros((K, Gb, H)), *carry))
        return (dk, dv), dq

    zeros = jnp.zeros(row.k.shape)
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), jnp.arange(n))
    return dq, dk, dv


def _to_blocks(x: Float[Array, "B T N H"], K: int, block: int) -> Float[Array, "B n K Gb H"]:
    B, T, N, H = x.shape
    x = x.reshape(B, T // block, block, K, N // K, H)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(B, T // block, K, N // K * block, H)


def _from_blocks(x: Float[Array, "B n K Gb H"], block: int) -> Float[Array, "B T N H"]:
    B, n, K, Gb, H = x.shape
    x = x.reshape(B, n, K, Gb // block, block, H)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(B, n * block, K * (Gb // block), H)


def _rows(q, k, v, layout: Layout, block: int) -> _Grouped:
    K = k.shape[2]
    tokens = (x.reshape(x.shape[0], -1, block) for x in layout)
    return _Grouped(_to_blocks(q, K, block), _to_blocks(k, K, block), _to_blocks(v, K, block), *tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layout: Layout,
    plan: BlockPlan,
    block: int,
) -> Float[Array, "B T N H"]:
    """Self-attention over packed rows under the mask of `attention.allowed`; softmax in float32.

    Args:
        k, v, layout: of the whole rows [B, S, ...].
        plan: of `block_plan` for the same layout, block and queries.
        block: tokens; divides T and S.
    """
    return _forward(q, k, v, layout, plan, block)[0]


def _forward(q, k, v, layout, plan, block):
    scale, groups = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    out, logsumexp = jax.lax.map(
        lambda x: _forward_row(*x, scale=scale, groups=groups), (_rows(q, k, v, layout, block), plan)
    )
    return _from_blocks(out, block), (q, k, v, layout, plan, out, logsumexp)


def _backward(block, saved, gradient):
    q, k, v, layout, plan, out, logsumexp = saved
    K, scale, groups = k.shape[2], q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    arguments = (_rows(q, k, v, layout, block), plan, out, logsumexp, _to_blocks(gradient, K, block))
    gradients = jax.lax.map(lambda x: _backward_row(*x, scale=scale, groups=groups), arguments)
    return *(_from_blocks(g, block).astype(q.dtype) for g in gradients), None, None


blockwise_attention.defvjp(_forward, _backward)
